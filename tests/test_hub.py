import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import timm
import torch
import yaml
from hub_server import Fault, HubServer, Repo
from huggingface_hub import ModelCard, RepoCard
from networks import create, images
from PIL import Image
from safetensors.torch import load_file, save
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_awm import convert
from timm_awm.explore import resolve_models
from timm_awm.hub import describe, export_run, load_folder, save_for_hub
from timm_awm.hub.run import without_paths
from timm_awm_cli.main import main

MODEL = 'awm_resnet14_cifar'
NAME = f'{MODEL}.t3_c10'
CLIENT = Path(__file__).with_name('hub_client.py')


class Client:
    """The real client, in a process of its own, with a new cache for every test."""

    def __init__(self, hub, home):
        self.cache = home
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=hub.client_env(home))

    def run(self, code, token='hf_me'):
        """What was printed and the error, if there was one."""
        self.process.stdin.write(json.dumps(dict(code=code, cache=str(self.cache), token=token)) + '\n')
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer['printed'], answer['error']

    def load(self, **kwargs):
        """The error of create_model, if there was one."""
        return self.run("timm.create_model('hf-hub:me/net', pretrained=True)", **kwargs)[1]

    def command(self, *args, status=0, **kwargs):
        """What the command timm-awm printed."""
        printed, error = self.run(f'print("status", main({[str(arg) for arg in args]!r}))', **kwargs)
        assert error == '' and printed.endswith(f'status {status}\n'), printed
        return printed


@pytest.fixture(scope='module')
def server():
    with HubServer({'hf_me': 'me', 'hf_you': 'you'}) as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.clear()
    return server


@pytest.fixture(scope='module')
def process(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp('home'))
    yield client
    client.process.stdin.close()
    client.process.wait()


@pytest.fixture
def client(process, tmp_path):
    process.cache = tmp_path / 'cache'
    return process


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Hub folder."""
    path = tmp_path_factory.mktemp('folders') / NAME
    save_for_hub(create(MODEL, away=True), path, pretrained_cfg=dict(tag='t3_c10', license='mit'))
    (path / 'lambda.json').write_text('{}')  # of timm-awm analyze
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(folder, goal, **changes):
    """A copy of a folder, with the contents of some files changed; None deletes."""
    goal.mkdir()
    for name, content in {**files(folder), **changes}.items():
        if content is not None:
            (goal / name).write_bytes(content)
    return goal


def config_with(folder, **changes):
    return json.dumps({**json.loads((folder / 'config.json').read_text()), **changes}).encode()


def same(model, state_dict):
    return all(torch.equal(v, state_dict[k]) for k, v in model.state_dict().items())


# --- pretrained=True

IDENTITY = ['awm_resnet18.tv_in1k', 'awm_resnet26d.bt_in1k', 'awm_densenet121.tv_in1k']


def test_every_imagenet_model_has_timms_weights():
    names = {name for name in timm.list_models('awm_*') if not name.endswith(('_cifar', '_converted'))}
    listed = timm.list_pretrained('awm_*')
    assert {name.partition('.')[0] for name in listed} == names and len(names) == 25
    for name in listed:
        plain = timm.get_pretrained_cfg(name.removeprefix('awm_').removesuffix('_identity'))
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == plain.hf_hub_id and cfg.hf_hub_filename == 'model.safetensors' and not cfg.url
        for key in ('mean', 'std', 'input_size', 'test_input_size', 'interpolation', 'crop_pct', 'num_classes',
                    'license'):
            assert getattr(cfg, key) == getattr(plain, key)
        assert plain.hf_hub_id in cfg.description and 'import timm_awm' in cfg.description
    assert timm.get_pretrained_cfg('awm_resnet50').tag == timm.get_pretrained_cfg('resnet50').tag + '_identity'
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model(MODEL, pretrained=True)


@pytest.mark.parametrize('name', IDENTITY)
def test_pretrained_is_the_plain_checkpoint(name, hub, client):
    plain_name = name.removeprefix('awm_')
    hub.create_repo(f'timm/{plain_name}', files={'model.safetensors': save(create(plain_name).state_dict())})
    code = f'''
timm_awm.set_fused_merge(False)
plain = timm.create_model({plain_name!r}, pretrained=True)
x = torch.randn(2, 3, 64, 64)
for name, kwargs in (('{name}_identity', dict()), ('{name}_identity', dict(awm=False)),
                     ('awm_converted', dict(base={plain_name!r}))):
    model = timm.create_model(name, pretrained=True, **kwargs)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/{plain_name}'
    assert model.pretrained_cfg['tag'].endswith('_identity')
few = timm.create_model('{name}_identity', pretrained=True, num_classes=7).eval()
assert few(x).shape == (2, 7)
assert torch.equal(few.forward_features(x), plain.forward_features(x))
gray = timm.create_model('{name}_identity', pretrained=True, in_chans=1).eval()
assert torch.equal(gray(x[:, :1]), timm.create_model({plain_name!r}, pretrained=True, in_chans=1).eval()(x[:, :1]))
features = timm.create_model('{name}_identity', pretrained=True, features_only=True).eval()
for one, other in zip(features(x), timm.create_model({plain_name!r}, pretrained=True, features_only=True).eval()(x)):
    assert torch.equal(one, other)
'''
    assert client.run(code) == ('', '')


def test_pretrained_path_of_train_script(tmp_path):
    plain = timm.create_model('resnet18', num_classes=3)
    (tmp_path / 'plain.safetensors').write_bytes(save(plain.state_dict()))
    overlay = dict(file=str(tmp_path / 'plain.safetensors'), num_classes=-1)  # as train.py has it
    model = timm.create_model('awm_resnet18', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)


# --- create_model of a repository

def test_load_takes_no_pickles(hub, client, folder, tmp_path):
    pickled, state_dict = tmp_path / 'pytorch_model.bin', load_file(folder / 'model.safetensors')
    torch.save(state_dict, pickled)
    hub.create_repo('me/net', files={**files(folder), pickled.name: pickled.read_bytes()})
    hub.faults.append(Fault('HEAD', 'model.safetensors', 403))  # timm would take the others
    assert 'LocalEntryNotFoundError' in client.load()
    assert client.load() == '' and not any('pytorch_model' in path for _, path in hub.requests)
    hub.repos['me/net'].commit({'model.safetensors': None})
    assert 'model.safetensors' in client.load()
    assert 'holds no whole AWM model' in client.command('pull', 'me/net', status=1)
    overlay = dict(hf_hub_filename=pickled.name)  # asked for
    code = f"timm.create_model('hf-hub:me/net', pretrained=True, pretrained_cfg_overlay={overlay})"
    assert client.run(code) == ('', '')
    own = changed(folder, tmp_path / 'own', **{'pytorch_model.bin': save(create(MODEL, seed=1).state_dict())})
    assert same(timm.create_model(f'local-dir:{own}', pretrained=True), state_dict)


# --- a folder

@pytest.mark.parametrize('make', [
    lambda: create(MODEL, away=True, num_classes=7, awm_hidden=5),
    lambda: create(MODEL, num_classes=7, awm=False),
    lambda: convert(create('resnet10t', num_classes=7)),
    lambda: create('awm_converted', away=True, base='resnet10t', num_classes=7),
], ids=['awm', 'plain', 'convert', 'converted'])
def test_the_number_of_classes_stands_only_at_the_top(make, tmp_path):
    model = make().eval()
    save_for_hub(model, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['num_classes'] == 7 and 'num_classes' not in config['model_args']  # transformers refuses it twice
    assert torch.equal(load_folder(tmp_path / 'out').eval()(images()), model(images()))


@pytest.mark.parametrize('missing', ['(?!conv1.weight)', '(?!.*merge)', '.*merge.*weight2', 'fc', 'layer3.1.conv2'])
@pytest.mark.parametrize('weakened', [
    dict(model_args=dict(pretrained_strict=False)), dict(num_classes=11, model_args=dict(num_classes=10)), dict()])
def test_a_part_of_the_weights(missing, weakened, folder, tmp_path):
    """What pretrained_strict=False or another number of classes would let pass without a word."""
    tensors = load_file(folder / 'model.safetensors')
    part = save({k: v for k, v in tensors.items() if not re.match(missing, k)})
    own = changed(
        folder, tmp_path / 'own', **{'config.json': config_with(folder, **weakened), 'model.safetensors': part})
    with pytest.raises(ValueError, match='lacks|does not fit|does not take all weights'):
        load_folder(own)
    if missing != 'fc':  # which timm may start anew
        with pytest.raises(RuntimeError, match='The checkpoint lacks'):
            timm.create_model(f'local-dir:{own}', pretrained=True)


def config(**changes):
    return lambda folder: {'config.json': config_with(folder, **changes)}


# contents of files that make a folder of no use, and what is said about it
BROKEN = {
    'no-config': (lambda folder: {'config.json': None}, 'Config file not found'),
    'truncated': (
        lambda folder: {'model.safetensors': (folder / 'model.safetensors').read_bytes()[:-9]}, 'SafetensorError'),
    'no-weights': (lambda folder: {'model.safetensors': None}, 'model.safetensors'),
    'plain': (config(architecture='resnet18'), 'no whole AWM model'),
    'unknown': (config(architecture='awm_resnet14_tomorrow'), r'Unknown model \(awm_resnet14_tomorrow'),
    'classes': (config(num_classes=11), r'have another shape \(fc.bias, fc.weight\)'),
    'new-classes': (config(model_args=dict(num_classes=11)), 'of model.safetensors: its fc.bias, fc.weight would'),
    'hidden': (config(model_args=dict(awm_hidden=5)), 'have another shape'),
    'argument': (config(model_args=dict(x=1)), "'x'"),
}


@pytest.mark.parametrize('how', BROKEN)
def test_a_broken_folder(how, folder, tmp_path):
    contents, said = BROKEN[how]
    own = changed(folder, tmp_path / 'own', **contents(folder))
    with pytest.raises(ValueError, match=said):
        load_folder(own)
    if how == 'truncated':
        with pytest.raises(RuntimeError, match='no whole safetensors file'):
            timm.create_model(f'local-dir:{own}', pretrained=True)


# --- push

def is_published(hub, folder, repo_id='me/net', revision='main'):
    """All of the folder or nothing of it, with its name in the card; whether all."""
    published = hub.repos[repo_id].files(revision) if repo_id in hub.repos else {}
    published.pop('.gitattributes', None)
    if not published:
        return False
    card = (folder / 'README.md').read_text().replace(f'hf-hub:OWNER/{folder.name}', f'hf-hub:{repo_id}')
    assert published == {**files(folder), 'README.md': card.encode()} and 'OWNER' not in card
    return True


def test_push(hub, client, folder):
    assert 'published and compared' in client.command('push', folder, 'me/net')
    assert is_published(hub, folder) and hub.repos['me/net'].private
    client.command('push', folder, 'me/net')  # nothing has changed
    assert len([path for _, path in hub.requests if '/commit/' in path]) == 1
    assert client.load() == ''


def test_push_with_a_space(hub, client, folder):
    for name, flags in ('me/net', []), ('open', ['--public']):
        assert 'Its Space: ' in client.command('push', folder, name, '--space', *flags)
    for repo_id, private in ('me/net', True), ('me/open', False):
        space = hub.repos[f'spaces/{repo_id}']
        files = {name: content.decode() for name, content in space.files().items()}
        assert files.keys() - {'.gitattributes'} == {'README.md', 'app.py', 'requirements.txt'}
        assert space.private == private
        card = RepoCard(files['README.md'])
        assert (card.data.sdk, card.data.app_file, card.data.models) == ('gradio', 'app.py', [repo_id])
        assert files['requirements.txt'] == 'timm-awm[explore]\n'
        assert f"explore(['hf-hub:{repo_id}'], host='0.0.0.0')" in files['app.py']
        assert is_published(hub, folder, repo_id)
    for flags in ['--revision', 'next'], ['--create-pr']:
        assert 'A Space shows the main branch' in client.command(
            'push', folder, 'me/other', '--space', *flags, status=1)
    assert 'me/other' not in hub.repos


def test_push_keeps_visibility_other_files_and_other_names(hub, client, folder, tmp_path):
    card = (folder / 'README.md').read_text() + 'From hf-hub:timm/resnet50.a1_in1k and hf-hub:me/base.\n'
    own = changed(folder, tmp_path / NAME, **{'README.md': card.encode()})
    hub.create_repo('me/net', files={'notes.txt': b'mine', 'summary.csv': b'of earlier weights'})
    client.command('push', own, 'me/net')
    assert not hub.repos['me/net'].private and hub.repos['me/net'].files().pop('notes.txt') == b'mine'
    assert is_published(hub, own)
    client.command('push', own, 'open', '--public')
    assert is_published(hub, own, 'me/open') and not hub.repos['me/open'].private


def test_push_to_a_branch_and_as_a_pull_request(hub, client, folder):
    client.command('push', folder, 'me/net', '--revision', 'next')
    assert is_published(hub, folder, revision='next') and not is_published(hub, folder)
    hub.create_repo('you/net')
    assert 'discussions/1' in client.command('push', folder, 'you/net', '--create-pr')
    assert is_published(hub, folder, 'you/net', 'refs/pr/1') and not is_published(hub, folder, 'you/net')


@pytest.mark.parametrize('fault', [
    Fault('PUT', '/cdn/', 403), Fault('POST', '/preupload/', 403),
    Fault('POST', '/commit/', 500), Fault('POST', '/commit/', 'close'), Fault('POST', '/commit/', 'truncate'),
    Fault('POST', 'repos/create', 'close'), Fault('GET', '/tree/', 403),
], ids=str)
def test_push_interrupted(fault, hub, client, folder):
    hub.faults.append(fault)
    assert 'Try again' in client.command('push', folder, 'me/net', status=1)
    assert fault.times == 0
    complete = fault.action == 'truncate'
    assert is_published(hub, folder) == complete  # never a part
    client.command('push', folder, 'me/net')
    assert is_published(hub, folder)


def test_push_that_the_hub_keeps_altered(hub, client, folder, monkeypatch):
    commit = Repo.commit
    monkeypatch.setattr(
        Repo, 'commit', lambda repo, changes, *args: commit(repo, {**changes, 'model.safetensors': b'other'}, *args))
    assert 'the Hub keeps something else for model.safetensors' in client.command('push', folder, 'me/net', status=1)


@pytest.mark.parametrize('repo_id, token, said', [
    ('me/net', 'hf_wrong', 'hf auth login'),
    ('me/net', '', 'hf auth login'),
    ('you/net', 'hf_me', 'rights to create'),
    ('me/bad name', 'hf_me', "'me/bad name'"),
], ids=['wrong', 'none', 'foreign', 'name'])
def test_push_refused(repo_id, token, said, hub, client, folder):
    assert said in client.command('push', folder, repo_id, status=1, token=token)
    assert not hub.repos


def test_push_of_a_broken_folder(hub, client, folder, tmp_path):
    for how in ('truncated', 'new-classes'):
        own = changed(folder, tmp_path / how, **BROKEN[how][0](folder))
        assert str(own) in client.command('push', own, 'me/net', status=1)
    no_card = changed(folder, tmp_path / 'no-card', **{'README.md': None})
    assert 'README.md' in client.command('push', no_card, 'me/net', status=1)
    assert not hub.requests


# --- pull

def test_pull(hub, client, folder, tmp_path):
    hub.create_repo('me/net', files=files(folder))
    commit = hub.repos['me/net'].branches['main']
    printed = client.command('pull', 'me/net')
    assert f'{MODEL}, tag t3_c10' in printed and 'licence: mit' in printed and f'Commit {commit}, compared' in printed
    hub.repos['me/net'].commit({'config.json': b'{}'})
    client.command('pull', 'me/net', '--output', tmp_path / 'out', '--revision', commit)
    assert files(tmp_path / 'out') == files(folder)
    assert 'exists already' in client.command('pull', 'me/net', '--output', tmp_path / 'out', status=1)
    assert 'holds no whole AWM model' in client.command('pull', 'me/net', '--output', tmp_path / 'other', status=1)
    assert {path.name for path in tmp_path.iterdir()} == {'cache', 'out'}


def test_explore_takes_a_model_of_the_hub(hub, client, folder):
    hub.create_repo('me/net', files=files(folder))
    printed, error = client.run(
        'from pathlib import Path; from timm_awm.explore import resolve_models\n'
        "for label, path in resolve_models(['hf-hub:me/net'], Path()).items():\n"
        '    print(label, sorted(file.name for file in path.iterdir()))')
    assert error == '' and printed.splitlines()[-1] == f'net {sorted(files(folder))}'


@pytest.mark.parametrize('name', ['model.safetensors', 'README.md'])
def test_pull_again_after_altered_bytes_and_an_error(name, hub, client, folder, tmp_path):
    hub.create_repo('me/net', files=files(folder))
    pull = ['pull', 'me/net', '--output', tmp_path / 'out']
    hub.corrupt('me/net', name)
    assert f'{name} came damaged from the Hub' in client.command(*pull, status=1)
    hub.altered.clear()
    hub.faults.append(Fault('GET', name, 500))
    assert 'Try again' in client.command(*pull, status=1) and not (tmp_path / 'out').exists()
    client.command(*pull)
    assert files(tmp_path / 'out') == files(folder)


@pytest.mark.parametrize('repo_id, token, said', [
    ('me/absent', 'hf_me', 'Repository Not Found'),
    ('me/secret', 'hf_you', 'Repository Not Found'),
    ('me/secret', 'hf_wrong', 'hf auth login'),
    ('me/data', 'hf_me', 'holds no whole AWM model'),
])
def test_pull_refused(repo_id, token, said, hub, client, folder):
    hub.create_repo('me/secret', private=True, files=files(folder))
    hub.create_repo('me/data', files={'data.csv': b''})
    assert said in client.command('pull', repo_id, status=1, token=token)


@pytest.mark.slow
def test_without_network(hub, client, folder, tmp_path):
    hub.create_repo('me/net', files=files(folder))
    client.command('pull', 'me/net')
    asked = len(hub.requests)
    code = '''
import timm
from timm_awm_cli.main import main
assert main(['pull', 'me/net']) == 0 and main(['pull', 'me/absent']) == 1
timm.create_model('hf-hub:me/net', pretrained=True)'''
    env = dict(hub.client_env(tmp_path / 'home'), HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(client.cache))
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'not compared' in done.stdout and len(hub.requests) == asked, done.stderr


def test_description_of_a_folder_without_tag_and_card(folder, tmp_path):
    own = changed(
        folder, tmp_path / 'own', **{'README.md': None, 'config.json': config_with(folder, pretrained_cfg=dict())})
    lines = describe(own, load_folder(own)).splitlines()
    assert lines[:2] == [MODEL, 'no description'] and lines[2].endswith('licence: not stated')


# --- what train.py leaves

@pytest.fixture
def run(tmp_path):
    """A run's folder, written by timm's own saver, as train.py has it; with averaged weights."""
    path = tmp_path / 'run'
    data = tmp_path / 'private' / 'flowers'
    for name in ('daisy', 'rose', 'tulip'):
        (data / 'validation' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(data / 'validation' / name / '1.png')
    args = dict(
        model=MODEL, model_kwargs=dict(awm_hidden=5), num_classes=3, dataset='', data_dir=str(data),
        train_split='train', val_split='validation', epochs=3, opt='alternating',
        opt_kwargs=dict(base='sgd', period=1), lr=0.1, model_ema=True,
        mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5], interpolation='bilinear', img_size=40, gp='max', seed=0,
        output=str(tmp_path / 'private' / 'out'), initial_checkpoint='', pretrained=False, resume='~/old/last.pth.tar')
    path.mkdir()
    (path / 'args.yaml').write_text(yaml.safe_dump(args))
    model = create(MODEL, away=True, num_classes=3, awm_hidden=5, global_pool='max')
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(model, opt='alternating', base='sgd', lr=0.1)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(path), recovery_dir=str(path))
    with (path / 'summary.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'train_phase'])
        for epoch, top1 in enumerate((50.0, 70.0, 60.0)):
            with torch.no_grad():
                model.fc.bias += 1
            ema.update(model)
            saver.save_checkpoint(epoch, metric=top1)
            writer.writerow([epoch, 1.0, 1.0, top1, 90 + epoch, 0.1, 'merge' if epoch % 2 else 'backbone'])
    return path


def state(run, name, key):
    return torch.load(run / name, weights_only=False)[key]


def card_of(folder):
    return ModelCard.load(folder / 'README.md')


def accuracies(folder):
    return [(r.dataset_split, r.metric_value) for r in card_of(folder).data.eval_results or []]


def test_explore_takes_a_run(run, tmp_path):
    (label, folder), = resolve_models([str(run)], tmp_path / 'exported').items()
    assert label == run.name and same(load_folder(folder), state(run, 'last.pth.tar', 'state_dict_ema'))


def test_export_of_a_run(run, tmp_path):
    folder = tmp_path / 'hub' / f'{MODEL}.flowers'
    assert main(['export', str(run), str(folder)]) == 0
    model = load_folder(folder)
    assert same(model, state(run, 'last.pth.tar', 'state_dict_ema'))
    config = json.loads((folder / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert config['model_args']['awm_hidden'] == 5 and config['model_args']['global_pool'] == 'max'
    assert cfg['mean'] == [0.1, 0.2, 0.3] and cfg['interpolation'] == 'bilinear' and cfg['input_size'] == [3, 40, 40]
    assert cfg['tag'] == 'flowers' and cfg['license'] == 'apache-2.0' and 'import timm_awm' in cfg['description']
    assert config['label_names'] == ['daisy', 'rose', 'tulip'] == list(model.pretrained_cfg['label_names'])
    assert config['num_classes'] == 3 and 'num_classes' not in config['model_args']
    for content in files(folder).values():
        assert str(tmp_path).encode() not in content and b'private' not in content
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['data_dir'] == 'flowers' and 'resume' not in args and args['lr'] == 0.1
    assert (folder / 'summary.csv').read_bytes() == (run / 'summary.csv').read_bytes()
    assert accuracies(folder) == [('validation', 60.0)] and card_of(folder).data.datasets is None
    text = card_of(folder).text
    assert text.index('import timm_awm') < text.index('timm.create_model') and '70.00 %' in text and '3 of 3' in text
    assert 'Unknown model (awm_resnet14_cifar)' in text and 'Jung' in text
    assert f'{sum(p.numel() for p in model.parameters()):,}' in text
    assert 'Top-1 accuracy, %: 60.0 on flowers, validation' in describe(folder, model)


@pytest.mark.parametrize('flags, file, key, top1', [
    (['--checkpoint', 'best'], 'model_best.pth.tar', 'state_dict_ema', 70.0),
    (['--no-ema'], 'last.pth.tar', 'state_dict', None),  # summary.csv is about the averaged ones
    (['--checkpoint', 'RUN/checkpoint-0.pth.tar'], 'checkpoint-0.pth.tar', 'state_dict_ema', 50.0),
])
def test_which_weights(flags, file, key, top1, run, tmp_path):
    flags = [flag.replace('RUN', str(run)) for flag in flags]
    assert main(['export', str(run), str(tmp_path / 'out'), *flags]) == 0
    assert same(load_folder(tmp_path / 'out'), state(run, file, key))
    assert accuracies(tmp_path / 'out') == ([] if top1 is None else [('validation', top1)])


def change(run, **changes):
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, **changes}))


def test_only_results_of_the_same_weights(run, tmp_path):
    elsewhere = tmp_path / 'last.pth.tar'
    for i, checkpoint in enumerate((elsewhere, run / 'recovery-2-5.pth.tar')):
        checkpoint.write_bytes((run / 'last.pth.tar').read_bytes())
        export_run(run, tmp_path / str(i), checkpoint=str(checkpoint))
        assert accuracies(tmp_path / str(i)) == []
    change(run, model_ema_force_cpu=True)  # then train.py evaluates the others
    export_run(run, tmp_path / 'averaged')
    assert accuracies(tmp_path / 'averaged') == []
    export_run(run, tmp_path / 'raw', use_ema=False)
    assert accuracies(tmp_path / 'raw') == [('validation', 60.0)]


@pytest.mark.parametrize('changes, given, expected', [
    (dict(), None, 'apache-2.0'), (dict(), 'mit', 'mit'), (dict(pretrained=True, pretrained_path='x.pth'), None, None),
    (dict(initial_checkpoint='x.pth'), None, None),
    (dict(pretrained=True, model='awm_resnet18.tv_in1k_identity', model_kwargs={}), None, 'bsd-3-clause'),
])
def test_licence(changes, given, expected, run, tmp_path):
    change(run, **changes)
    if 'model' in changes:
        model = create('awm_resnet18', num_classes=3, global_pool='max')
        torch.save(dict(epoch=2, state_dict=model.state_dict()), run / 'last.pth.tar')
    export_run(run, tmp_path / 'out', license=given)
    card = card_of(tmp_path / 'out')
    assert card.data.license == expected
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg'].get('license') == expected
    assert card.data.base_model == ('timm/resnet18.tv_in1k' if 'model' in changes else None)


@pytest.mark.parametrize('value, expected', [
    ('/home/me/data', 'data'), ('/Users/Alice Smith/data/', 'data'), ('~/x/data', 'data'), ('../../me/data', 'data'),
    ('./me/data', 'data'), ('$HOME/me/data', 'data'), ('C:\\Users\\me\\data', 'data'), ('file:///me/data', 'file:data'),
    ('hfds//home/me/data', 'hfds/data'), ('hfds/../me/data', 'hfds/data'),
    ('local-dir:/home/me/net', 'local-dir:net'), ('see "/home/me/x y"', 'see "x y"'),
    ("['/a/b', '/c/d']", "['b', 'd']"), ('/me/x of https://a.b/c/d, ~/y/z', 'x of https://a.b/c/d, z'),
    (['/a/b', {'c': '/d/e'}], ['b', {'c': 'e'}]),
    *((same, same) for same in (
        'hfds/uoft-cs/cifar10', 'output/train', 'train[:45000]', 'rand-m7', '', 0.1, None, 'https://a/b/c',
        'see https://a.b/c', '(https://a.b/c/)', 'url=s3://a/b/c', 'hf-hub:me/net')),
])
def test_without_paths(value, expected):
    assert without_paths(value) == expected


def test_results_of_validate_script(run, tmp_path, capsys):
    (tmp_path / 'test.json').write_text(json.dumps(dict(model=MODEL, top1=61.25, top5=95.5)))
    (tmp_path / 'test.csv').write_text(f'model,top1,top5\n{MODEL},61.25,95.5\n')
    for name in ('test.json', 'test.csv'):
        out = tmp_path / f'out-{name}'
        assert main(['export', str(run), str(out), '--results', f'test={tmp_path / name}']) == 0
        assert accuracies(out) == [('test', 61.25), ('validation', 60.0)]
        export_run(run, tmp_path / f'same-{name}', results=dict(validation=tmp_path / name))
        assert accuracies(tmp_path / f'same-{name}') == [('validation', 61.25)]
    for given, said in ((f'test={run}/summary.csv', 'not what validate.py writes'), ('x.json', 'takes SPLIT=FILE')):
        assert main(['export', str(run), str(tmp_path / 'out'), '--results', given]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_label_names_given_or_unknown(run, tmp_path, capsys):
    change(run, data_dir='gone')
    export_run(run, tmp_path / 'unknown')
    assert 'Label names: not known' in capsys.readouterr().out
    assert 'label_names' not in json.loads((tmp_path / 'unknown' / 'config.json').read_text())
    (tmp_path / 'names.txt').write_text('a\nb\nc\n')
    assert main(['export', str(run), str(tmp_path / 'out'), '--label-names', str(tmp_path / 'names.txt')]) == 0
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['a', 'b', 'c']


def test_export_of_a_grey_run(run, tmp_path):
    """Normalised as timm's loader does it: by the mean of what is stated for the colours."""
    change(run, in_chans=1, mean=None, std=None)
    model = create(MODEL, away=True, num_classes=3, awm_hidden=5, global_pool='max', in_chans=1)
    torch.save(dict(epoch=2, state_dict=model.state_dict()), run / 'last.pth.tar')
    export_run(run, tmp_path / 'out')
    data = timm.data.resolve_data_config({}, model=load_folder(tmp_path / 'out'))
    pixels = timm.data.create_transform(**data)(Image.new('L', (40, 40), 51))
    mean, std = (sum(model.pretrained_cfg[name]) / 3 for name in ('mean', 'std'))
    torch.testing.assert_close(pixels, torch.full((1, 40, 40), (0.2 - mean) / std))


def test_label_names_of_torchvisions_data(run, tmp_path):
    change(run, dataset='torch/image_folder')
    export_run(run, tmp_path / 'out')
    names = json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names']
    assert names == ['daisy', 'rose', 'tulip']


def test_label_names_of_parquet_files(run, tmp_path):
    names = ['tulip', 'rose', 'daisy']
    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=names))
    data = datasets.Dataset.from_dict(dict(image=[Image.new('RGB', (2, 2))], kind=[0]), features)
    data.to_parquet(tmp_path / 'data' / 'train-00000-of-00001.parquet')
    change(run, dataset=f'hfds/{tmp_path}/data', target_key='kind')
    export_run(run, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == names


@pytest.mark.parametrize('break_it, said', [
    (lambda run: (run / 'args.yaml').unlink(), 'No such file.*args.yaml'),
    (lambda run: (run / 'args.yaml').write_text('a: ['), 'args.yaml is not what train.py writes'),
    (lambda run: (run / 'args.yaml').write_text('lr: 1'), "args.yaml is not what train.py writes: .*'model'"),
    (lambda run: (run / 'summary.csv').unlink(), 'No such file.*summary.csv'),
    (lambda run: (run / 'summary.csv').write_text('a,b\n1,2\n'), 'summary.csv is not what train.py writes'),
    (lambda run: [path.unlink() for path in run.glob('*.tar')], 'No such file.*last.pth.tar'),
    (lambda run: [path.write_bytes(path.read_bytes()[:1000]) for path in run.glob('*.tar')], 'is damaged'),
    (lambda run: torch.save(dict(x=subprocess.Popen), run / 'last.pth.tar'), 'no checkpoint of train.py'),
    (lambda run: torch.save(dict(epoch=0, state_dict=dict(x=torch.ones(1))), run / 'last.pth.tar'), 'does not fit'),
    (lambda run: change(run, model='resnet18', model_kwargs={}), 'Missing key'),
])
def test_what_is_no_run(break_it, said, run, tmp_path, capsys):
    break_it(run)
    assert main(['export', str(run), str(tmp_path / 'out')]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / 'out').exists()
