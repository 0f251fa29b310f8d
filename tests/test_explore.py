import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import gradio
import pytest
import timm
import torch
from networks import create
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from timm_awm import record_mixing_weights
from timm_awm.explore import MEGAPIXELS, Explored, explore, read_picture
from timm_awm.hub import save_for_hub
from timm_awm_cli.main import main

HUB = Path(__file__).parents[1] / 'hub'
RESNET, DENSENET = 'awm_resnet14_cifar', 'awm_densenet22_cifar'
expect.set_options(timeout=120_000)  # a busy machine stays far below
PICTURE = Image.new('RGB', (50, 70), (90, 20, 160))
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Hub folders of a ResNet, a DenseNet and a plain control."""
    root = tmp_path_factory.mktemp('models')
    for name, model in dict(
            resnet=create(RESNET, away=True), densenet=create(DENSENET, away=True), plain=create(RESNET, awm=False),
    ).items():
        save_for_hub(model, root / name)
    return root


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    """An aeroplane."""
    path = tmp_path_factory.mktemp('pictures') / 'picture.png'
    Image.open(Path(__file__).with_name('cifar10_test_100.png')).crop((96, 0, 128, 32)).save(path)
    return path


def gif(path):
    frames = [Image.new('P', (40, 30), i) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def damaged_exif(path):
    Image.new('RGB', (40, 30), 'white').save(path, exif=b'Exif\0\0garbage')


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new('RGB', (30, 40)).save(path, exif=exif)


PICTURES = {
    'alpha.png': lambda path: Image.new('RGBA', (40, 30), (0, 0, 0, 0)).save(path),
    'transparent.gif': lambda path: Image.new('P', (40, 30)).save(path, transparency=0),
    'cmyk.jpg': lambda path: Image.new('CMYK', (40, 30)).save(path),
    'cmyk.tiff': lambda path: Image.new('CMYK', (40, 30)).save(path),
    'bits.bmp': lambda path: Image.new('1', (40, 30), 1).save(path),
    'damaged_exif.png': damaged_exif,
    'damaged_exif.webp': damaged_exif,
}


@pytest.mark.parametrize('name', PICTURES)
def test_pictures_of_every_kind_are_white(name, tmp_path):
    PICTURES[name](tmp_path / name)
    image = read_picture(str(tmp_path / name))
    assert (image.mode, image.size) == ('RGB', (40, 30)) and image.getpixel((7, 7)) == (255, 255, 255)


@pytest.mark.parametrize('make, name, pixel', [
    (gif, 'moving.gif', 0), (rotated, 'rotated.jpg', 0),
    (lambda path: Image.new('I;16', (40, 30), 128 * 256).save(path), '16_bits.png', 128)])
def test_pictures_are_still_upright_and_of_8_bits(make, name, pixel, tmp_path):
    make(tmp_path / name)
    image = read_picture(str(tmp_path / name))
    assert image.size == (40, 30) and image.getpixel((1, 1)) == (pixel,) * 3


def truncated(path):
    Image.effect_noise((400, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


BAD = {
    'gone.png': (lambda path: None, 'deleted.*drop it again'),
    'truncated.png': (truncated, 'cannot be read as a picture'),
    'large.png': (lambda path: Image.new('1', (9000, 9000)).save(path), f'too large.*{MEGAPIXELS} million'),
    'thin.png': (lambda path: Image.new('1', (400000, 1)).save(path), 'too thin.*100 times'),
    'huge.png': (lambda path: Image.new('1', (20000, 20000)).save(path), f'too large.*{MEGAPIXELS} million'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_picture(name, tmp_path):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_picture(str(tmp_path / name))


@pytest.mark.parametrize('name', ['resnet', 'densenet', 'plain'])
def test_what_is_seen_is_what_the_network_infers(name, folders):
    explored = Explored(folders / name, name)
    seen = explored.look(PICTURE)
    x = explored.transform(PICTURE)[None]
    with torch.inference_mode():
        torch.testing.assert_close(seen.probabilities, explored.model(x)[0].softmax(0))
    if name == 'plain':
        assert seen.lambdas == {}
        return
    with record_mixing_weights(explored.model) as lambdas, torch.inference_mode():
        explored.model(x)
    torch.testing.assert_close(seen.lambdas, lambdas)
    identity, model = list(lambdas)[1:3], copy.deepcopy(explored.model)
    for merge in identity:
        torch.nn.init.zeros_(model.get_submodule(merge).mix.weight2)
    with torch.inference_mode():
        expected = model(x)[0].softmax(0)
    torch.testing.assert_close(explored.look(PICTURE, identity).probabilities, expected)
    assert not torch.equal(seen.probabilities, expected)


@pytest.mark.parametrize('name, connection, merge, path', [
    ('resnet', 'layer2.0', 'layer2.0.merge', 0),
    ('densenet', 'denseblock2.denselayer3, path 2', 'features.denseblock2.denselayer3.merge', 1)])
def test_a_weight_set_by_hand(name, connection, merge, path, folders):
    explored = Explored(folders / name, name)
    own, changed = explored.look(PICTURE), explored.look(PICTURE, (), connection, 0.9)
    assert connection in explored.connections
    lambdas, before = changed.lambdas[merge][0], own.lambdas[merge][0]
    expected = before * 0.1 / (1 - before[path])
    expected[path] = 0.9
    torch.testing.assert_close(lambdas, expected)
    assert not torch.equal(own.probabilities, changed.probabilities)
    assert torch.equal(explored.look(PICTURE).probabilities, own.probabilities)  # nothing stays changed
    mix = explored.mixes[merge]
    with torch.no_grad():  # λ of this path is 1
        mix.weight1.fill_(1.), mix.weight2.fill_(-1e4)[path].fill_(1e4)
    mix.register_forward_pre_hook(lambda module, args: (args[0].abs() + 1,))
    lambdas = explored.look(PICTURE, (), connection, 0.9).lambdas[merge][0]
    assert lambdas[path] == pytest.approx(0.9) and lambdas.sum() == pytest.approx(1)


def test_the_published_models_have_something_to_compare_with():
    for folder in HUB.glob('awm_*.t*'):
        explored = Explored(folder, folder.name)
        images = {key: group['images'] for key, group in explored.reference['groups'].items()}
        assert images.pop('all') == 10000 == sum(images[str(i)] for i in range(len(explored.classes)))


@pytest.mark.parametrize('text', [
    '{', '{"data": 1}', '{"data": "x", "groups": {"all": {"images": 1, "merges": {}}}}', 'resnet'])
def test_a_damaged_reference_or_that_of_another_model_is_named(text, folders, tmp_path):
    shutil.copytree(folders / 'densenet', tmp_path / 'net')
    if text == 'resnet':
        text = (HUB / f'{RESNET}.t3_c10' / 'lambda.json').read_text()
    (tmp_path / 'net' / 'lambda.json').write_text(text)
    with pytest.raises(ValueError, match='lambda.json is not what timm-awm analyze writes'):
        Explored(tmp_path / 'net', 'net')


@pytest.mark.parametrize('kwargs', [dict(num_classes=0), dict(in_chans=4)], ids=str)
def test_models_that_the_page_cannot_show(kwargs, tmp_path):
    save_for_hub(create(RESNET, **kwargs), tmp_path / 'net')
    with pytest.raises(ValueError, match='net has .* classes and takes . channels'):
        Explored(tmp_path / 'net', 'net')


def test_many_at_once_see_their_own(folders):
    explored = Explored(folders / 'resnet', 'resnet')
    asked = [((), 'none'), (list(explored.mixes), 'none'), ((), 'layer3.1')] * 8
    alone = [explored.look(PICTURE, *settings, 0.9).probabilities for settings in asked[:3]] * 8
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda settings: explored.look(PICTURE, *settings, 0.9).probabilities, asked))
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize('label_names, classes', [
    ({1: 'dog', 0: 'cat', 2: 'cow'}, ['cat', 'dog', 'cow']), ({'2': 'cow'}, ['0', '1', 'cow']),
    (['cat', 'dog'], ['cat', 'dog', '2']), (['cat', 'cat', 'cow'], ['cat (0)', 'cat (1)', 'cow'])], ids=str)
def test_names_of_classes_in_all_forms_of_timm(label_names, classes, tmp_path):
    model = create(RESNET, num_classes=3)
    timm.models.save_for_hf(model, tmp_path, model_config=dict(label_names=label_names), safe_serialization=True)
    assert Explored(tmp_path, 'net').classes == classes


def test_a_hundred_thousand_classes(tmp_path):
    names = [f'class {i}' for i in range(100_000)]
    model = create(RESNET, num_classes=len(names))
    timm.models.save_for_hf(model, tmp_path, model_config=dict(label_names=names), safe_serialization=True)
    start = time.process_time()
    assert Explored(tmp_path, 'net').classes == names
    assert time.process_time() - start < 30  # where each name is looked for in all: minutes


@pytest.mark.parametrize('args, message', [
    ([], f'{HUB / RESNET}.t3_c10'), (['--port', '70000'], 'port must be 0-65535'),
    (['--host', '192.0.2.1'], 'assign requested address'), (['--host', 'no host'], 'not known')])
def test_a_model_or_an_address_that_cannot_be_had(capsys, args, message):
    assert main(['explore', str(HUB), *args]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope='module')
def server(folders, tmp_path_factory):
    """The address of the page that the command serves."""
    temporary = tmp_path_factory.mktemp('temporary')
    models = [HUB / f'{RESNET}.t3_c10', folders / 'densenet', folders / 'plain']
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_awm', 'explore', *models], stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'TMPDIR': str(temporary), 'HTTP_PROXY': 'http://127.0.0.1:9'})  # where nobody answers
    yield re.search(r'http://127\.0\.0\.1:\d+/', process.stdout.readline())[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    # no uploads are left; torch 2.9 leaves a script of its own
    assert not [path for path in temporary.rglob('*') if path.is_file() and path.suffix != '.py']


@pytest.fixture
def page(server):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1200, height=1000))
        elsewhere = []
        page.on('request', lambda request: elsewhere.append(request.url))
        page.goto(server)
        expect(page.get_by_role('heading', name='Which paths')).to_be_visible()
        yield page
        browser.close()
    allowed = 'data:', 'blob:', server, 'https://cdnjs.cloudflare.com/ajax/libs/iframe-resizer/'  # of older Gradio
    assert not [url for url in elsewhere if not url.startswith(allowed)]


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason='NOT TESTED: the page in a browser. Install one: apt-get install chromium')


def drop(page, path):
    page.locator('input[type=file]').set_input_files(path)


@needs_browser
def test_a_person_explores(page, picture):
    column = page.locator('.column', has=page.get_by_role('heading', name=f'{RESNET}.t3_c10')).last
    page.locator('.gallery-item').first.click()  # an example
    expect(column.get_by_test_id('label-output-value')).to_be_visible()
    drop(page, picture)
    expect(column.get_by_test_id('label-output-value')).to_have_text('airplane')
    figure = column.locator('img').first
    before = figure.get_attribute('src')
    column.get_by_label('Set by hand, whatever is ticked').click()
    page.get_by_role('option', name='layer3.1').click()
    slider = column.get_by_role('slider')
    slider.focus()
    for _ in range(45):  # the keyboard alone
        slider.press('ArrowLeft')
    effect = column.get_by_text('With these merges:')
    expect(effect).to_be_visible()
    expect(figure).not_to_have_attribute('src', before)
    before = effect.inner_text()
    column.get_by_label('layer1.0').check()
    expect(effect).not_to_have_text(before)
    dense = page.locator('.column', has=page.get_by_role('heading', name='densenet')).last
    expect(dense.locator('img').first).to_be_visible()  # the heat map
    expect(figure).to_have_attribute('alt', re.compile(r'λ of this picture: layer1.0 0.50, .*; layer3.1 0.05, 0.95$'))
    page.set_viewport_size(dict(width=360, height=740))  # a phone
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    for heading in page.get_by_role('heading').all():
        assert heading.evaluate('e => e.scrollWidth <= e.clientWidth')


@needs_browser
def test_pictures_good_and_bad(page, picture, tmp_path):
    column = page.locator('.column', has=page.get_by_role('heading', name=f'{RESNET}.t3_c10')).last
    drop(page, picture)
    expect(column).to_contain_text('97%')
    make, message = BAD['truncated.png']
    make(tmp_path / 'bad.png')
    drop(page, tmp_path / 'bad.png')
    alert = page.get_by_test_id('toast-body')
    expect(alert).to_contain_text(message)
    expect(page.get_by_test_id('label-output-value')).to_have_count(0)  # nothing of the good one stays
    assert alert.inner_text().count(message) == 1
    page.get_by_test_id('toast-close').click()

    white = Explored(HUB / f'{RESNET}.t3_c10', 'net').look(Image.new('RGB', (40, 30), 'white')).probabilities.max()
    PICTURES['alpha.png'](tmp_path / 'alpha.png')
    drop(page, tmp_path / 'alpha.png')
    expect(column).to_contain_text(f'{white:.0%}')  # shown as `read_picture` reads it


@pytest.mark.skipif(sys.platform != 'linux', reason='127.0.0.2 is there on Linux alone')
def test_the_page_is_for_this_machine_alone(server):
    port = int(re.search(r':(\d+)/', server)[1])
    socket.create_connection(('127.0.0.1', port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(('127.0.0.2', port), 5)


@pytest.mark.skipif(not os.path.exists('/proc/net/if_inet6'), reason='the machine has no IPv6')
def test_the_page_at_an_ipv6_address(folders, monkeypatch):
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    served = []

    def visit(page):
        with urlopen(f'http://[::1]:{page.server_port}/') as answer:
            served.append(answer.status)
        page.close()

    monkeypatch.setattr(gradio.Blocks, 'block_thread', visit)
    explore([str(folders / 'plain')], '::1')
    assert served == [200]
