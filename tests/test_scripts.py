"""timm-awm train, validate and benchmark, mostly with stand-ins for timm's scripts: more in test_train_script.py."""
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from timm_awm_cli import scripts
from timm_awm_cli.main import main
from timm_awm_cli.scripts import find_recipe, find_script, last_checkpoint

REPORT = '''\
import json, os, sys
passive = os.environ['OMP_WAIT_POLICY']
print(json.dumps(dict(argv=sys.argv, plugin='timm_awm' in sys.modules, name=__name__, wait=passive)))
sys.exit(7)
'''
WAIT = '''\
import sys, time
try:
    print('started', flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(9)
'''


@pytest.fixture
def clean(monkeypatch, tmp_path):
    monkeypatch.delenv('TIMM_TRAIN_SCRIPT', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(path, text=REPORT):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def command(clean, monkeypatch):
    """The command that timm-awm becomes where there is a GPU, and train.py in the working directory."""
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(script(Path('train.py'))))

    def command(*args):
        became = []
        monkeypatch.setattr(scripts, 'device_flags', lambda given: [])
        monkeypatch.setattr(os, 'execv', lambda path, argv: became.append(argv[1:]))
        assert main(list(args)) == 0
        return became[0]

    return command


def test_arguments_pass_through(clean, command):
    args = ['--epochs', '3', '-b', '16', '--opt-kwargs', 'base=sgd', 'period=1', 'data dir', '--crop-pct=.9', '-vb8']
    script(clean / 'other.py')
    assert command('train', *args[:4], '--script', 'other.py', *args[4:]) == [
        'other.py', *args, '--device-modules', 'timm_awm']
    assert command('train', '--', '--help')[:2] == ['train.py', '--help']
    assert command('train', '-b', '2', '--', 'data')[1:] == ['-b', '2', '--device-modules', 'timm_awm', '--', 'data']
    script(clean / 'benchmark.py')
    assert command('benchmark', '--model', 'x', '-c')[2:] == ['benchmark.py', '--model', 'x', '-c']


def test_modules_and_recipe_of_train(clean, command):
    name = 'cifar10/awm_resnet20_cifar'
    assert command('train', '-c', name, '--device-modules', 'json', 'timm_awm') == [
        'train.py', '-c', str(find_recipe(name)), '--device-modules', 'timm_awm', 'json']
    (clean / 'mine.yaml').write_text('device_modules: [json]\nepochs: 1\n')
    assert command('train', '--config', 'mine.yaml') == [
        'train.py', '-c', 'mine.yaml', '--device-modules', 'timm_awm', 'json']


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
def test_signals_reach_the_script(clean):
    path = script(clean / 'train.py', WAIT)
    started = [sys.executable, '-m', 'timm_awm_cli', 'train', '--script', path]
    # a shell gives its background jobs an ignored SIGINT, which would be inherited
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, preexec_fn=functools.partial(
            signal.signal, signal.SIGINT, signal.default_int_handler)) as process:
        assert process.stdout.readline() == 'started\n'
        process.send_signal(signal.SIGINT)
        assert process.wait() == 9


@pytest.fixture
def published(clean, monkeypatch):
    """timm's train.py at a tag, in a place of our own."""
    page = script(clean / 'v9.8.7' / 'train.py')
    monkeypatch.setattr(scripts, 'URL', f'{clean.as_uri()}/v{{version}}/{{name}}.py')
    monkeypatch.setattr(scripts, 'DIGESTS', dict.fromkeys(scripts.DIGESTS, hashlib.sha256(REPORT.encode()).hexdigest()))
    monkeypatch.setattr(scripts, 'VERSION', '9.8.7')
    monkeypatch.setattr(scripts, 'version', lambda name: '9.8.7')
    return page


def test_where_scripts_are_looked_for(clean, monkeypatch, published):
    script(clean / 'train.py')
    assert 'cache' in find_script('train').parts
    clone, own = clean / 'clone', script(clean / 'own' / 'my_train.py')
    script(clone / 'train.py')
    script(clone / 'validate.py')
    for given in clone, clone / 'train.py':
        monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(given))
        assert (find_script('train'), find_script('validate')) == (clone / 'train.py', clone / 'validate.py')
        with pytest.raises(RuntimeError, match='Cannot get.*benchmark'):  # not beside it
            find_script('benchmark')
    assert find_script('train', str(own)) == own
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(own))
    assert find_script('train') == own
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(clean / 'own'))
    with pytest.raises(FileNotFoundError, match='TIMM_TRAIN_SCRIPT leads to .*train.py.*no file'):
        find_script('train')
    with pytest.raises(FileNotFoundError, match='--script leads to .*no file; name train.py in a clone of timm'):
        find_script('train', str(clone / 'trian.py'))


def test_download_is_checked_and_kept(published, monkeypatch, capsys):
    path = find_script('train')
    assert path.read_text() == REPORT and 'v9.8.7/train.py' in capsys.readouterr().err
    published.unlink()
    monkeypatch.setattr(scripts, 'version', lambda name: '9.9.0')
    assert find_script('train') == path
    error = capsys.readouterr().err
    assert 'takes train.py of timm 9.8.7, the newest that it was tested with, for timm 9.9.0' in error
    assert 'downloads' not in error
    path.write_bytes(b'damaged')
    with pytest.raises(RuntimeError, match='Cannot get.*Clone timm at the tag v9.8.7'):
        find_script('train')
    path.unlink()
    script(published, f'{REPORT}, altered')
    with pytest.raises(RuntimeError, match='Cannot get.*hash.*--script or TIMM_TRAIN_SCRIPT'):
        find_script('train')
    assert not [path for path in Path('cache').rglob('*') if path.is_file()]


def test_recipe_names():
    assert find_recipe('cifar10/awm_resnet20_cifar.yaml') == find_recipe('cifar10/awm_resnet20_cifar')
    with pytest.raises(FileNotFoundError, match="'data' is neither a file nor a recipe; timm-awm recipes"):
        find_recipe('data')
    with pytest.raises(FileNotFoundError, match="nearest is 'cifar10/awm_resnet20_cifar'; timm-awm recipes lists"):
        find_recipe('cifar10/awm_resnet20_cifr')


def save(path):
    torch.save(dict(x=torch.arange(9999)), path)
    return path


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, bit):
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def test_newest_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / 'new') is None
    tmp = save(tmp_path / 'tmp.pth.tar')
    cut(tmp)  # killed in the first save
    assert last_checkpoint(tmp_path) is None
    save(tmp_path / 'checkpoint-9.pth.tar')
    old = save(tmp_path / 'checkpoint-10.pth.tar')
    save(tmp_path / 'recovery-11-4.pth.tar')
    save(tmp_path / 'checkpoint-12.old.pth.tar')  # put aside by somebody
    assert last_checkpoint(tmp_path) == old
    last = save(tmp_path / 'last.pth.tar')
    assert last_checkpoint(tmp_path) == last
    save(tmp)  # killed before it took the place of the last
    assert last_checkpoint(tmp_path) == tmp
    cut(tmp)
    assert last_checkpoint(tmp_path) == last
    flip(last, 8 * (last.stat().st_size // 2))
    assert last_checkpoint(tmp_path) == old
    cut(old)
    cut(tmp_path / 'checkpoint-9.pth.tar')
    with pytest.raises(ValueError, match='Every checkpoint in .* is damaged: move it away'):
        last_checkpoint(tmp_path)


def test_resume_auto(clean, command, capsys):
    args = ('train', '--output', 'out', '--experiment', 'x', '--resume', 'auto')
    run_in_folder = ['--output', 'out', '--experiment', 'x']
    assert command(*args)[1:-2] == [*run_in_folder, '--resume', '']
    assert 'no checkpoint to resume from' in capsys.readouterr().err
    (clean / 'out' / 'x').mkdir(parents=True)
    save(clean / 'out' / 'x' / 'last.pth.tar')
    assert command(*args)[1:-2] == [*run_in_folder, '--resume', 'out/x/last.pth.tar']
    (clean / 'mine.yaml').write_text('output: out\nexperiment: x\nresume: auto')
    assert command('train', '-c', 'mine.yaml')[3:-2] == ['--resume', 'out/x/last.pth.tar']
    assert command('train', '-c', 'mine.yaml', '--resume', '', '--output', '')[3:-2] == ['--output', '', '--resume', '']
    assert command('train', '--resume', 'some.pth.tar')[1:-2] == ['--resume', 'some.pth.tar']
    assert main(['train', '--resume', 'auto']) == 1
    assert '--resume auto needs --experiment NAME' in capsys.readouterr().err
    assert main([*args, '--start-epoch=3']) == 1
    assert 'leave --start-epoch out' in capsys.readouterr().err


@pytest.mark.parametrize('text, message', [('- a', 'must hold names and values'), ('a: b: c', 'is no YAML file')])
def test_bad_config(text, message, command, clean, capsys):
    (clean / 'mine.yaml').write_text(text)
    assert main(['train', '-c', 'mine.yaml']) == 1
    assert f'mine.yaml {message}' in capsys.readouterr().err


@pytest.mark.parametrize('hidden, driver, given, expected', [
    (None, True, {}, []),
    (None, False, {}, ['--device', 'cpu', '-j', '4']),
    ('', True, {}, ['--device', 'cpu', '-j', '4']),
    (None, False, dict(workers='2'), ['--device', 'cpu']),
    (None, False, dict(device='mps'), []),
])
def test_without_a_gpu_scripts_run_on_the_cpu(hidden, driver, given, expected, monkeypatch, capsys):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if hidden is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    monkeypatch.setattr(os.path, 'exists', lambda path: driver and path == '/dev/nvidiactl')
    monkeypatch.setattr(scripts.shutil, 'which', lambda name: None)
    monkeypatch.setattr(scripts, 'version', lambda name: '2.9.0')
    monkeypatch.setattr(os, 'cpu_count', lambda: 16)
    assert scripts.device_flags(given) == expected
    assert ('found no GPU and runs on the CPU' in capsys.readouterr().err) == bool(expected)


def pictures(root, suffix='.png'):
    """Three classes that differ in colour, in folders that people make."""
    for split, count in (('train', 8), ('validation', 4)):
        for channel, name in enumerate(('rote Äpfel', 'Birnen, süß', 'price_$5_to_$10')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f'Bild {number}{suffix}')
    (root / 'train' / '.notes').mkdir()  # without images: no class
    return root


def test_data_of_a_recipe_give_way_to_a_folder(clean, command, capsys):
    recipe = yaml.safe_load(find_recipe('finetune/awm_resnet50').read_text())
    of_data = 'dataset', 'input_key', 'target_key', 'train_split', 'val_split', 'num_classes'
    method = {key: value for key, value in recipe.items() if key not in of_data}
    pictures(clean / 'meine Bilder', '.JPG')

    def config(*args):
        became = command('train', '-c', 'finetune/awm_resnet50', *args)
        assert became[1] == '-c' and became[3:-2] == [*args]
        return yaml.safe_load(Path(became[2]).read_text())

    assert config('--data-dir', 'meine Bilder') == {**method, 'num_classes': 3}
    message = capsys.readouterr().err
    assert 'leaves out of the recipe, for --data-dir is given: dataset=hfds/timm/oxford-iiit-pet, input_key' in message
    assert 'found 3 classes in meine Bilder/train' in message
    assert config('--data-dir=meine Bilder', '--num-classes', '5', '--dataset', '') == method
    # a copy of the same data, or a cache for them
    assert config('--dataset', 'hfds/copy') == config('--dataset', 'hfds/copy', '--data-dir', 'x') == recipe
    for wrong, message in (
            ('meine Bilder/train', "needs folders 'train' and 'val'"), ('.', 'has no folders with PNG or JPEG'),
            ('nowhere', 'There is no folder nowhere')):
        (clean / 'train').mkdir(exist_ok=True)
        (clean / 'val').mkdir(exist_ok=True)
        assert main(['train', '-c', 'finetune/awm_resnet50', '--data-dir', wrong]) == 1
        assert message in capsys.readouterr().err
    assert main(['train', '-c', 'finetune/awm_resnet50', '--dataset', '']) == 1
    assert 'name it by --data-dir' in capsys.readouterr().err


def test_what_opt_kwargs_replace_is_said(clean, command, capsys):
    args = '-c', 'finetune/awm_resnet50', '--opt-kwargs', 'period=2'
    assert command('train', *args)[1:-2] == ['-c', str(find_recipe('finetune/awm_resnet50')), *args[2:]]
    assert 'leaves out of the recipe, for --opt-kwargs is given: base=adamw\n' in capsys.readouterr().err
    command('train', *args, 'base=adamw')
    assert 'leaves out' not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('TIMM_TRAIN_SCRIPT'), reason="NOT TESTED: pictures with timm's real train.py")
def test_pictures_of_ones_own_are_trained_on_validated_and_exported(tmp_path):
    recipe = find_recipe('finetune/awm_resnet50').read_text(encoding='utf-8')
    (tmp_path / 'mein Rezept.yaml').write_text(recipe, encoding='utf-8-sig')  # as Notepad saves it
    folder = pictures(tmp_path / 'Bilder für mich')
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'plain.pth')

    def run(*args):
        command = [sys.executable, '-m', 'timm_awm_cli', *map(str, args)]
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'})
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    images = '--data-dir', folder, '--img-size', 64
    run('train', '-c', 'mein Rezept.yaml', *images, '--model', 'awm_resnet18', '--pretrained-path', 'plain.pth',
        '-b', 8, '--lr', .001, '--warmup-epochs', 0, '--epochs', 3, '--output', 'out', '--experiment', 'run')
    validated = run('validate', '--model', 'awm_resnet18', '--num-classes', 3, *images, '--crop-pct', .95,
                    '--checkpoint', 'out/run/last.pth.tar')
    top1 = json.loads(validated.partition('--result')[2])['top1']
    assert top1 > 60  # chance is 33
    run('export', 'out/run', 'awm_resnet18.mine')
    model = timm.create_model(f'local-dir:{tmp_path / "awm_resnet18.mine"}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == ['Birnen, süß', 'price_$5_to_$10', 'rote Äpfel']
    assert f'{top1:.2f}' in (tmp_path / 'awm_resnet18.mine' / 'README.md').read_text(encoding='utf-8')
