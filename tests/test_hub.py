import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import Fault, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save
from timm.utils import CheckpointSaver, ModelEmaV3
from timm_awm.cli import main
from torch import nn

from timm_awm.hub import describe, export_run, load_folder, save_for_hub
from timm_awm.hub.run import without_paths
from timm_awm.layers import MixingWeights
from timm_awm.scripts import recipes

MODEL = 'awm_resnet14_cifar'
CLIENT = Path(__file__).with_name('hub_client.py')


class Client:
    """The real client, in a process of its own."""

    def __init__(self, hub, home):
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=hub.client_env(home))

    def __call__(self, code, cache='cache', token='hf_me'):
        """What was printed and the error, if there was one."""
        request = json.dumps(dict(code=code, cache=str(self.home / cache), token=token))
        self.process.stdin.write(request + '\n')
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer['printed'], answer['error']


@pytest.fixture(scope='module')
def server():
    with HubServer({'hf_me': 'me', 'hf_you': 'you'}) as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.repos.clear()
    server.faults.clear()
    server.altered.clear()
    server.requests.clear()
    return server


@pytest.fixture(scope='module')
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp('home'))
    yield client
    client.process.stdin.close()
    client.process.wait()


def trained(name=MODEL, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    for m in model.modules():
        if isinstance(m, MixingWeights):
            nn.init.normal_(m.weight2)
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Hub folder."""
    path = tmp_path_factory.mktemp('folders') / 'awm_resnet14_cifar.t3_c10'
    save_for_hub(trained(), path, pretrained_cfg=dict(tag='t3_c10', license='mit'))
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- pretrained=True

IDENTITY = ['awm_resnet18.tv_in1k', 'awm_resnet26d.bt_in1k', 'awm_densenet121.tv_in1k', 'awm_resnext50_32x4d.a1_in1k']


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
    torch.manual_seed(0)
    plain = timm.create_model(plain_name).eval()
    hub.create_repo(f'timm/{plain_name}', files={'model.safetensors': save(plain.state_dict())})
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
    assert client(code) == ('', '')
    elsewhere = client.home / 'elsewhere'
    assert client(f"timm.create_model('{name}_identity', pretrained=True, cache_dir={str(elsewhere)!r})") == ('', '')
    assert list(elsewhere.rglob('model.safetensors'))


def test_pretrained_path_of_train_script(tmp_path):
    plain = timm.create_model('resnet18', num_classes=3)
    (tmp_path / 'plain.safetensors').write_bytes(save(plain.state_dict()))
    overlay = dict(file=str(tmp_path / 'plain.safetensors'), num_classes=-1)  # as train.py has it
    model = timm.create_model('awm_resnet18', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)


# --- loading from elsewhere

LOAD = "timm.create_model('hf-hub:me/net', pretrained=True)"


def publish(hub, folder, repo_id='me/net', **changes):
    """Puts a Hub folder on the server, with some files changed."""
    hub.create_repo(repo_id, files={**files(folder), **changes})


def config_with(folder, **changes):
    return json.dumps({**json.loads((folder / 'config.json').read_text()), **changes}).encode()


def check_load(client, folder, cache):
    """A second try succeeds, with the right weights."""
    code = f"""
timm_awm.set_fused_merge(False)
model = {LOAD}
expected = hub.load_folder(Path({str(folder)!r}))
assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())"""
    assert client(code, cache) == ('', '')


def test_load(hub, client, folder):
    publish(hub, folder)
    check_load(client, folder, 'load')


@pytest.mark.parametrize('fault, error', [
    (Fault('GET', r'/cdn/', 'truncate', 99), 'Error: '),
    (Fault('GET', r'/cdn/', 'reset'), 'Error: '),
    (Fault('GET', r'/cdn/', 500), '500'),
    (Fault('HEAD', r'model.safetensors', 500, 99), 'LocalEntryNotFoundError'),
    (Fault('HEAD', r'config.json', 403, 99), 'LocalEntryNotFoundError'),
], ids=lambda value: f'{value.method}-{value.action}' if isinstance(value, Fault) else '')
def test_load_interrupted(fault, error, hub, client, folder, request):
    cache = request.node.name
    # timm would take these if it did not find the others
    publish(hub, folder, **{'pytorch_model.bin': b'pickled'})
    hub.faults.append(fault)
    _, message = client(LOAD, cache)
    assert error in message
    assert not any('pytorch_model' in path for _, path in hub.requests)
    hub.faults.clear()
    check_load(client, folder, cache)


def test_load_of_altered_bytes(hub, client, folder):
    publish(hub, folder)
    hub.corrupt('me/net', 'model.safetensors')
    _, message = client(LOAD, 'altered')
    assert 'model.safetensors of me/net was damaged' in message and 'try again' in message
    hub.altered.clear()
    check_load(client, folder, 'altered')


def test_load_of_a_damaged_cache(hub, client, folder):
    publish(hub, folder)
    assert client(LOAD, 'damaged') == ('', '')
    blob, = (path.resolve() for path in (client.home / 'damaged').rglob('model.safetensors'))
    blob.write_bytes(blob.read_bytes()[:-1000])
    _, message = client(LOAD, 'damaged')
    assert 'model.safetensors of me/net was damaged' in message
    check_load(client, folder, 'damaged')


@pytest.mark.parametrize('changes, error', [
    (dict(architecture='awm_resnet14_tomorrow'), r'Unknown model (awm_resnet14_tomorrow)'),
    (dict(num_classes=11), 'config.json says that the checkpoint is of 11 classes, but its classifier has 10'),
    (dict(model_args=dict(pretrained_strict=False, awm_hidden=5)), 'mix.weight1'),
], ids=['architecture', 'classes', 'strict'])
def test_load_of_a_wrong_configuration(changes, error, hub, client, folder):
    publish(hub, folder, **{'config.json': config_with(folder, **changes)})
    _, message = client(LOAD, 'wrong' + error[:9])
    assert error in message


@pytest.mark.parametrize('missing', ['(?!conv1.weight)', '(?!.*merge)', '.*merge', 'fc', 'layer3.1.conv2'])
@pytest.mark.parametrize('weakened', [
    dict(model_args=dict(pretrained_strict=False)), dict(num_classes=11, model_args=dict(num_classes=10)), dict()])
def test_load_of_a_part(missing, weakened, hub, client, folder):
    """What pretrained_strict=False or another number of classes would let pass without a word."""
    tensors = load_file(folder / 'model.safetensors')
    part = save({k: v for k, v in tensors.items() if not re.match(missing, k)})
    publish(hub, folder, **{'config.json': config_with(folder, **weakened), 'model.safetensors': part})
    cache = re.sub(r'\W', '', missing)
    _, message = client(LOAD, cache)
    assert 'The checkpoint lacks' in message
    printed, error = client(pull_code(), cache)
    assert error == 'AssertionError: 1' and 'The checkpoint lacks' in printed


def test_load_takes_no_file_that_a_configuration_names(hub, client, folder, tmp_path):
    other = tmp_path / 'other.safetensors'
    other.write_bytes(save(trained(seed=1).state_dict()))
    cfg = dict(json.loads((folder / 'config.json').read_text())['pretrained_cfg'], file=str(other))
    publish(hub, folder, **{'config.json': config_with(folder, pretrained_cfg=cfg)})
    check_load(client, folder, 'file')


def test_load_of_pickles(hub, client, folder):
    path = client.home / 'weights.bin'
    torch.save(load_file(folder / 'model.safetensors'), path)
    kept = files(folder)
    del kept['model.safetensors']
    hub.create_repo('me/net', files={**kept, 'pytorch_model.bin': path.read_bytes()})
    _, message = client(LOAD, 'pickles')
    assert 'me/net has no model.safetensors' in message and "hf_hub_filename='pytorch_model.bin'" in message
    overlay = dict(hf_hub_filename='pytorch_model.bin')
    assert client(LOAD[:-1] + f', pretrained_cfg_overlay={overlay})', 'pickles') == ('', '')


def test_load_of_a_local_folder(folder, tmp_path):
    own = tmp_path / 'folder'
    own.mkdir()
    for name, content in files(folder).items():
        (own / name).write_bytes(content)
    torch.save(trained(seed=1).state_dict(), own / 'pytorch_model.bin')  # which timm 1.0.28 prefers
    expected = load_folder(folder).state_dict()
    model = timm.create_model(f'local-dir:{own}', pretrained=True)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    (own / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no model.safetensors.*asked for'):
        timm.create_model(f'local-dir:{own}', pretrained=True)
    overlay = dict(file=str(own / 'pytorch_model.bin'))
    asked = timm.create_model(f'local-dir:{own}', pretrained=True, pretrained_cfg_overlay=overlay)
    assert not torch.equal(asked.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize('private, gated, token, error', [
    (True, False, '', 'RepositoryNotFoundError'),
    (True, False, 'hf_you', 'RepositoryNotFoundError'),
    (False, True, 'hf_you', 'GatedRepoError'),
], ids=['private-no-token', 'private-other', 'gated'])
def test_load_without_access(private, gated, token, error, hub, client, folder):
    hub.create_repo('me/net', private=private, gated=gated, files=files(folder))
    _, message = client(LOAD, f'access-{error}-{token}', token)
    assert error in message
    hub.repos['me/net'].accepted.add('you')
    if gated:
        assert client(LOAD, 'accepted', token) == ('', '')


# --- push

def push_code(folder, repo_id='me/net', *flags):
    return f"status = main({['push', str(folder), repo_id, *flags]!r})\nassert status == 0, status"


def is_published(hub, folder, repo_id='me/net', revision='main'):
    """All of the folder or nothing of it; whether all."""
    published = hub.repos[repo_id].files(revision) if repo_id in hub.repos else {}
    published.pop('.gitattributes', None)
    if not published:
        return False
    assert published.keys() == {path.name for path in folder.iterdir()}
    for name, content in files(folder).items():
        if name != 'README.md':
            assert published[name] == content
    card = published['README.md'].decode()
    assert f'hf-hub:{repo_id}' in card and 'OWNER' not in card
    return True


def test_push(hub, client, folder):
    printed, error = client(push_code(folder))
    assert error == '' and 'fetched back and compared' in printed
    assert is_published(hub, folder) and hub.repos['me/net'].private
    commits = [path for method, path in hub.requests if '/commit/' in path]
    assert len(commits) == 1
    printed, error = client(push_code(folder))  # nothing has changed
    assert error == '' and len([path for _, path in hub.requests if '/commit/' in path]) == 1
    check_load(client, folder, 'pushed')


def test_push_keeps_visibility_and_other_files(hub, client, folder):
    hub.create_repo('me/net', files={'notes.txt': b'mine'})
    assert client(push_code(folder))[1] == ''
    assert not hub.repos['me/net'].private
    assert hub.repos['me/net'].files()['notes.txt'] == b'mine'
    assert client(push_code(folder, 'me/open', '--public'))[1] == ''
    assert not hub.repos['me/open'].private


def test_push_of_other_weights_leaves_nothing_of_the_first(hub, client, folder, tmp_path):
    first = tmp_path / 'first'
    save_for_hub(trained(seed=1), first)
    (first / 'summary.csv').write_text('epoch\n')
    assert client(push_code(first))[1] == '' and 'summary.csv' in hub.repos['me/net'].files()
    assert client(push_code(folder))[1] == ''
    assert is_published(hub, folder)


def test_push_of_what_was_pulled(hub, client, folder, tmp_path):
    assert client(push_code(folder))[1] == ''
    assert client(pull_code('--output', tmp_path / 'pulled'), 'pulled')[1] == ''
    assert client(push_code(tmp_path / 'pulled', 'me/again'))[1] == ''
    assert b'hf-hub:me/again' in hub.repos['me/again'].files()['README.md']


def test_push_to_a_branch_and_as_a_pull_request(hub, client, folder):
    assert client(push_code(folder, 'me/net', '--revision', 'next'))[1] == ''
    assert is_published(hub, folder, revision='next') and not is_published(hub, folder)
    hub.create_repo('you/net')
    printed, error = client(push_code(folder, 'you/net', '--create-pr'))
    assert error == '' and 'discussions/1' in printed
    assert is_published(hub, folder, 'you/net', 'refs/pr/1') and not is_published(hub, folder, 'you/net')


def test_push_all(hub, client, folder, tmp_path):
    names = ('awm_resnet14_cifar.a', 'awm_resnet14_cifar.b')
    for name in names:
        save_for_hub(trained(), tmp_path / name)
    (tmp_path / 'results.csv').touch()
    printed, error = client(push_code(tmp_path, 'me', '--all'))
    assert error == ''
    assert all(is_published(hub, tmp_path / name, f'me/{name}') for name in names)
    hub.repos.clear()
    printed, error = client(f"assert main(['push', '--all', {str(tmp_path)!r}, '--dry-run']) == 0")
    assert error == '' and printed.count('can be published') == 2 and not hub.repos


@pytest.mark.parametrize('fault', [
    Fault('PUT', '/cdn/', 500), Fault('PUT', '/cdn/', 'close'), Fault('PUT', '/cdn/', 403),
    Fault('POST', '/preupload/', 403), Fault('POST', 'objects/batch', 403),
    Fault('POST', '/commit/', 500), Fault('POST', '/commit/', 'close'),
    Fault('POST', '/commit/', 'truncate'), Fault('POST', 'repos/create', 500), Fault('POST', 'repos/create', 'reset'),
    Fault('GET', '/cdn/', 500), Fault('GET', '/cdn/', 'reset'),
], ids=lambda fault: f'{fault.method}-{fault.path.strip("/").replace("/", "_")}-{fault.action}')
def test_push_interrupted(fault, hub, client, folder):
    hub.faults.append(fault)
    printed, error = client(push_code(folder))
    assert fault.times == 0
    if fault.method == 'PUT' and fault.action in (500, 'close'):
        assert error == ''  # the client tries again by itself
    else:
        assert 'AssertionError: 1' == error and 'timm-awm: ' in printed
        assert ('may not write' if fault.action == 403 and fault.method == 'POST' else 'ry again') in printed
        complete = fault.method == 'GET' or fault.action == 'truncate'
        assert is_published(hub, folder) == complete  # never a part
    assert client(push_code(folder))[1] == ''
    assert is_published(hub, folder)


def test_push_that_comes_back_altered(hub, client, folder):
    hub.create_repo('me/other', files=files(folder))
    hub.corrupt('me/other', 'model.safetensors')
    printed, error = client(push_code(folder))
    assert error == 'AssertionError: 1' and 'gives back something else for model.safetensors' in printed
    hub.altered.clear()
    assert client(push_code(folder))[1] == ''


@pytest.mark.parametrize('repo_id, token, said', [
    ('me/net', 'hf_wrong', 'does not accept the token'),
    ('me/net', '', 'hf auth login'),
    ('you/net', 'hf_me', 'may not write to you/net'),
    ('me/bad name', 'hf_me', "'me/bad name'"),
], ids=['wrong', 'none', 'foreign', 'name'])
def test_push_refused(repo_id, token, said, hub, client, folder):
    printed, error = client(push_code(folder, repo_id), token=token)
    assert error == 'AssertionError: 1' and said in printed
    assert not hub.repos


def test_what_is_not_pushed(hub, client, folder, tmp_path):
    extra = config_with(folder, pretrained_cfg=dict(x=1))
    for name, change, said in (
            ('no-card', lambda path: (path / 'README.md').unlink(), 'has no README.md'),
            ('no-config', lambda path: (path / 'config.json').unlink(), 'is no folder of a run'),
            ('json', lambda path: (path / 'config.json').write_text('{'), 'is no configuration'),
            ('short', lambda path: (path / 'model.safetensors').write_bytes(b'12345678'), 'holds no whole'),
            ('weights', lambda path: (path / 'model.safetensors').unlink(), 'no model.safetensors'),
            ('plain', lambda path: (path / 'config.json').write_bytes(config_with(folder, architecture='resnet18')),
             'no AWM model'),
            ('extra', lambda path: (path / 'config.json').write_bytes(extra), "'x'"),
    ):
        broken = tmp_path / name
        broken.mkdir()
        for file, content in files(folder).items():
            (broken / file).write_bytes(content)
        change(broken)
        printed, error = client(push_code(broken))
        assert error == 'AssertionError: 1' and said in printed, printed
    assert not hub.repos and not [request for request in hub.requests if request[0] == 'POST']


# --- pull

def pull_code(*flags, repo_id='me/net'):
    return f"status = main({['pull', repo_id, *map(str, flags)]!r})\nassert status == 0, status"


def test_pull(hub, client, folder, tmp_path):
    publish(hub, folder)
    commit = hub.repos['me/net'].branches['main']
    printed, error = client(pull_code(), 'pull')
    assert error == '' and 'awm_resnet14_cifar, tag t3_c10' in printed and 'licence: mit' in printed
    assert f'Commit {commit}, compared' in printed
    printed, error = client(pull_code('--output', tmp_path / 'out'), 'pull')
    assert error == '' and files(tmp_path / 'out') == files(folder)
    printed, error = client(pull_code('--output', tmp_path / 'out'), 'pull')
    assert 'exists already' in printed
    publish(hub, folder, **{'config.json': config_with(folder, architecture='other')})
    printed, error = client(pull_code('--revision', commit), 'pull2')
    assert 'no such revision' in printed  # the repository was made anew


@pytest.mark.parametrize('fault', [
    Fault('GET', '/cdn/', 500), Fault('GET', '/cdn/', 'reset'), Fault('GET', '/cdn/', 'truncate', 99),
    Fault('GET', '/api/models/', 500, 99), Fault('GET', '/tree/', 'close', 99),
], ids=lambda fault: f'{fault.path.strip("/").replace("/", "_")}-{fault.action}')
def test_pull_interrupted(fault, hub, client, folder, tmp_path, request):
    publish(hub, folder)
    hub.faults.append(fault)
    printed, error = client(pull_code('--output', tmp_path / 'out'), request.node.name)
    assert error == 'AssertionError: 1' and 'timm-awm: ' in printed and 'ry again' in printed
    assert not list(tmp_path.iterdir())
    hub.faults.clear()
    assert client(pull_code('--output', tmp_path / 'out'), request.node.name)[1] == ''
    assert files(tmp_path / 'out') == files(folder)


@pytest.mark.parametrize('name', ['model.safetensors', 'README.md'])
def test_pull_of_altered_bytes(name, hub, client, folder, tmp_path):
    publish(hub, folder)
    hub.corrupt('me/net', name)
    printed, error = client(pull_code('--output', tmp_path / 'out'), f'altered-{name}')
    assert error == 'AssertionError: 1' and f'{name} came damaged from the Hub' in printed
    assert not list(tmp_path.iterdir())
    hub.altered.clear()
    assert client(pull_code('--output', tmp_path / 'out'), f'altered-{name}')[1] == ''
    assert files(tmp_path / 'out') == files(folder)


def test_pull_of_pickles(hub, client, folder, tmp_path):
    torch.save(load_file(folder / 'model.safetensors'), tmp_path / 'weights.bin')
    kept = files(folder)
    del kept['model.safetensors']
    hub.create_repo('me/net', files={**kept, 'pytorch_model.bin': (tmp_path / 'weights.bin').read_bytes()})
    printed, error = client(pull_code(), 'pickled')
    assert error and '--allow-pickle' in printed
    printed, error = client(pull_code('--allow-pickle'), 'pickled')
    assert error and 'needs a folder: --output' in printed
    assert client(pull_code('--allow-pickle', '--output', tmp_path / 'out'), 'pickled')[1] == ''
    assert torch.equal(load_folder(tmp_path / 'out').conv1.weight, load_folder(folder).conv1.weight)
    assert not (tmp_path / 'out' / 'pytorch_model.bin').exists()
    torch.save(dict(x=subprocess.Popen), tmp_path / 'evil.bin')
    hub.create_repo('me/net', files={**kept, 'pytorch_model.bin': (tmp_path / 'evil.bin').read_bytes()})
    printed, error = client(pull_code('--allow-pickle', '--output', tmp_path / 'evil'), 'evil')
    assert error and 'holds more than weights' in printed and not (tmp_path / 'evil').exists()


@pytest.mark.parametrize('changes, said', [
    (dict(architecture='awm_resnet14_tomorrow'), "'awm_resnet14_tomorrow', which is no AWM model"),
    (dict(num_classes=11), '11 classes, but its classifier has 10'),
    (dict(model_args=dict(num_classes=11)), 'does not take all weights of model.safetensors: its fc.bias, fc.weight'),
    (dict(architecture=None), "'None', which is no AWM model"),
    (dict(architecture='resnet18', model_args=dict(pretrained_strict=False)), "'resnet18', which is no AWM model"),
])
def test_pull_of_a_wrong_configuration(changes, said, hub, client, folder, tmp_path):
    publish(hub, folder, **{'config.json': config_with(folder, **changes)})
    printed, error = client(pull_code('--output', tmp_path / 'out'), said[:9])
    assert error == 'AssertionError: 1' and said in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('repo_id, token, said', [
    ('me/absent', 'hf_me', 'no me/absent on the Hub'),
    ('me/secret', 'hf_you', 'no me/secret on the Hub'),
    ('me/secret', 'hf_wrong', 'hf auth login'),
    ('me/gated', 'hf_you', 'me/gated is gated: accept its terms'),
    ('me/data', 'hf_me', 'is no model of timm'),
])
def test_pull_refused(repo_id, token, said, hub, client, folder):
    hub.create_repo('me/secret', private=True, files=files(folder))
    hub.create_repo('me/gated', gated=True, files=files(folder))
    hub.create_repo('me/data', files={'data.csv': b''})
    printed, error = client(pull_code(repo_id=repo_id), f'refused-{token}', token)
    assert error == 'AssertionError: 1' and said in printed


def test_without_network(hub, client, folder, tmp_path):
    publish(hub, folder)
    assert client(pull_code(), 'offline')[1] == ''
    env = dict(hub.client_env(tmp_path / 'home'), HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(client.home / 'offline'))
    asked = len(hub.requests)

    def run(code):
        return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)

    loaded = run(f'import timm, timm_awm\n{LOAD}')
    assert loaded.returncode == 0, loaded.stderr
    pulled = run("from timm_awm.cli import main; raise SystemExit(main(['pull', 'me/net']))")
    assert pulled.returncode == 0 and 'not compared' in pulled.stdout
    absent = run("from timm_awm.cli import main; raise SystemExit(main(['pull', 'me/absent']))")
    assert absent.returncode == 1 and 'me/absent is not in the cache' in absent.stderr
    assert len(hub.requests) == asked


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
    model = trained(num_classes=3, awm_hidden=5, global_pool='max')
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


def test_export_of_a_run(run, tmp_path):
    folder = tmp_path / 'hub' / 'awm_resnet14_cifar.flowers'
    assert main(['push', str(run), '--dry-run', '--output', str(folder), '--recipe', 'cifar10/awm_resnet14_cifar']) == 0
    model = load_folder(folder)
    expected = state(run, 'last.pth.tar', 'state_dict_ema')
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    config = json.loads((folder / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert config['model_args']['awm_hidden'] == 5 and config['model_args']['global_pool'] == 'max'
    assert cfg['mean'] == [0.1, 0.2, 0.3] and cfg['interpolation'] == 'bilinear' and cfg['input_size'] == [3, 40, 40]
    assert cfg['tag'] == 'flowers' and cfg['license'] == 'apache-2.0' and 'import timm_awm' in cfg['description']
    assert config['label_names'] == ['daisy', 'rose', 'tulip'] == list(model.pretrained_cfg['label_names'])
    assert config['num_classes'] == 3
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and b'private' not in path.read_bytes()
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['data_dir'] == 'flowers' and 'resume' not in args and args['lr'] == 0.1
    assert (folder / 'summary.csv').read_bytes() == (run / 'summary.csv').read_bytes()
    assert 'awm_resnet14_cifar' in (folder / 'recipe.yaml').read_text()
    card = ModelCard.load(folder / 'README.md')
    result, = card.data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (60.0, 'flowers', 'validation')
    text = card.text
    assert text.index('import timm_awm') < text.index('timm.create_model') and '70.00 %' in text and '3 of 3' in text
    assert 'Jung' in text and f'{sum(p.numel() for p in model.parameters()):,}' in text


@pytest.mark.parametrize('flags, file, key, top1', [
    (['--checkpoint', 'best'], 'model_best.pth.tar', 'state_dict_ema', 70.0),
    (['--no-ema'], 'last.pth.tar', 'state_dict', None),  # summary.csv is about the averaged ones
    (['--checkpoint', 'RUN/checkpoint-0.pth.tar'], 'checkpoint-0.pth.tar', 'state_dict_ema', 50.0),
])
def test_which_weights(flags, file, key, top1, run, tmp_path):
    flags = [flag.replace('RUN', str(run)) for flag in flags]
    assert main(['push', str(run), '--dry-run', '--output', str(tmp_path / 'out'), *flags]) == 0
    expected = state(run, file, key)
    assert all(torch.equal(v, expected[k]) for k, v in load_folder(tmp_path / 'out').state_dict().items())
    results = ModelCard.load(tmp_path / 'out' / 'README.md').data.eval_results or []
    assert [result.metric_value for result in results] == ([] if top1 is None else [top1])


def change(run, **changes):
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, **changes}))


def test_only_results_of_the_same_weights(run, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    elsewhere = tmp_path / 'elsewhere' / 'last.pth.tar'
    elsewhere.write_bytes((run / 'last.pth.tar').read_bytes())
    (run / 'recovery-2-5.pth.tar').write_bytes((run / 'last.pth.tar').read_bytes())
    for i, checkpoint in enumerate((elsewhere, run / 'recovery-2-5.pth.tar')):
        export_run(run, tmp_path / str(i), checkpoint=str(checkpoint))
        assert not ModelCard.load(tmp_path / str(i) / 'README.md').data.eval_results
    change(run, model_ema_force_cpu=True)  # then train.py evaluates the others
    export_run(run, tmp_path / 'averaged')
    assert not ModelCard.load(tmp_path / 'averaged' / 'README.md').data.eval_results
    export_run(run, tmp_path / 'raw', use_ema=False)
    assert ModelCard.load(tmp_path / 'raw' / 'README.md').data.eval_results[0].metric_value == 60.0


@pytest.mark.parametrize('changes, given, expected', [
    (dict(), None, 'apache-2.0'), (dict(), 'mit', 'mit'), (dict(pretrained=True, pretrained_path='x.pth'), None, None),
    (dict(initial_checkpoint='x.pth'), None, None),
    (dict(pretrained=True, model='awm_resnet18.tv_in1k_identity', model_kwargs={}), None, 'bsd-3-clause'),
])
def test_licence(changes, given, expected, run, tmp_path):
    change(run, **changes)
    if 'model' in changes:
        model = trained('awm_resnet18', num_classes=3, global_pool='max')
        torch.save(dict(epoch=2, state_dict=model.state_dict()), run / 'last.pth.tar')
    export_run(run, tmp_path / 'out', license=given)
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.license == expected
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg'].get('license') == expected
    assert card.data.base_model == ('timm/resnet18.tv_in1k' if 'model' in changes else None)


def test_recipe_of_the_run_is_found(run, tmp_path):
    export_run(run, tmp_path / 'none')
    assert not (tmp_path / 'none' / 'recipe.yaml').exists()
    path = recipes()['cifar10/awm_resnet14_cifar']
    recipe = yaml.safe_load(path.read_text())
    change(run, **{**recipe, 'gp': None, 'model_kwargs': {}})
    torch.save(dict(epoch=2, state_dict=trained().state_dict()), run / 'last.pth.tar')
    export_run(run, tmp_path / 'out', label_names=list('abcdefghij'))
    assert (tmp_path / 'out' / 'recipe.yaml').read_bytes() == path.read_bytes()
    assert '-c recipe.yaml' in (tmp_path / 'out' / 'README.md').read_text()


def test_own_recipe_loses_its_folders(run, tmp_path):
    mine = tmp_path / 'mine.yaml'
    mine.write_text('model: awm_resnet14_cifar\ndata_dir: /home/alice/secret/data\n')
    export_run(run, tmp_path / 'out', recipe=str(mine))
    assert yaml.safe_load((tmp_path / 'out' / 'recipe.yaml').read_text()) == dict(
        model='awm_resnet14_cifar', data_dir='data')


@pytest.mark.parametrize('value, expected', [
    ('/home/me/data', 'data'), ('/Users/Alice Smith/data/', 'data'), ('~/x/data', 'data'), ('../../me/data', 'data'),
    ('./me/data', 'data'), ('$HOME/me/data', 'data'), ('C:\\Users\\me\\data', 'data'),
    ('hfds//home/me/data', 'hfds/data'), ('hfds/../me/data', 'hfds/data'),
    ('local-dir:/home/me/net', 'local-dir:net'), ('see "/home/me/x y"', 'see "x y"'),
    (['/a/b', {'c': '/d/e'}], ['b', {'c': 'e'}]),
    *((same, same) for same in ('hfds/uoft-cs/cifar10', 'output/train', 'train[:45000]', 'rand-m7', '', 0.1, None)),
])
def test_without_paths(value, expected):
    assert without_paths(value) == expected


def test_results_of_validate_script(run, tmp_path):
    (tmp_path / 'test.json').write_text(json.dumps([dict(model=MODEL, top1=61.25, top5=95.5)]))
    (tmp_path / 'test.csv').write_text(f'model,top1,top5\n{MODEL},61.25,95.5\n')
    for name in ('test.json', 'test.csv'):
        folder = tmp_path / f'out-{name}'
        export_run(run, folder, results=dict(test=tmp_path / name))
        results = ModelCard.load(folder / 'README.md').data.eval_results
        assert [(r.dataset_split, r.metric_value) for r in results] == [('test', 61.25), ('validation', 60.0)]
    with pytest.raises(ValueError, match='not what validate.py writes'):
        export_run(run, tmp_path / 'out', results=dict(test=run / 'summary.csv'))
    assert not (tmp_path / 'out').exists()


def test_label_names_given_or_unknown(run, tmp_path, capsys):
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, 'data_dir': 'gone'}))
    export_run(run, tmp_path / 'unknown')
    assert 'Label names: not known' in capsys.readouterr().out
    assert 'label_names' not in json.loads((tmp_path / 'unknown' / 'config.json').read_text())
    (tmp_path / 'names.txt').write_text('a\nb\nc\n')
    out = str(tmp_path / 'out')
    assert main(['push', str(run), '--dry-run', '--output', out, '--label-names', str(tmp_path / 'names.txt')]) == 0
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['a', 'b', 'c']


@pytest.mark.parametrize('break_it, said', [
    (lambda run: (run / 'args.yaml').unlink(), 'no args.yaml'),
    (lambda run: (run / 'args.yaml').write_text('a: ['), 'args.yaml is damaged'),
    (lambda run: (run / 'args.yaml').write_text('lr: 1'), 'which model was trained'),
    (lambda run: (run / 'summary.csv').unlink(), 'no summary.csv'),
    (lambda run: [path.unlink() for path in run.glob('*.tar')], 'no checkpoint'),
    (lambda run: [path.write_bytes(path.read_bytes()[:1000]) for path in run.glob('*.tar')], 'is damaged'),
    (lambda run: torch.save(dict(x=subprocess.Popen), run / 'last.pth.tar'), 'no checkpoint of train.py'),
    (lambda run: torch.save(dict(epoch=0, state_dict=dict(x=torch.ones(1))), run / 'last.pth.tar'), 'does not fit'),
    (lambda run: change(run, model_kwargs=dict(foo=1)), 'cannot be built'),
    (lambda run: change(run, model='resnet18', model_kwargs={}), 'does not fit|Missing key|not created under'),
    (lambda run: (run / 'summary.csv').write_text('a,b\n1,2\n'), 'not what train.py writes'),
])
def test_what_is_no_run(break_it, said, run, tmp_path, capsys):
    break_it(run)
    assert main(['push', str(run), '--dry-run', '--output', str(tmp_path / 'out')]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / 'out').exists()


def test_push_of_a_run(hub, client, run):
    printed, error = client(push_code(run, 'me/awm_resnet14_cifar.flowers'))
    assert error == '' and 'compared' in printed
    published = hub.repos['me/awm_resnet14_cifar.flowers'].files()
    assert {'model.safetensors', 'config.json', 'README.md', 'args.yaml', 'summary.csv'} <= published.keys()
    assert json.loads(published['config.json'])['pretrained_cfg']['tag'] == 'flowers'
    printed, error = client(pull_code(repo_id='me/awm_resnet14_cifar.flowers'), 'run')
    assert error == '' and 'Top-1 accuracy, %: 60.0 on flowers, validation' in printed


def test_a_plain_timm_says_only_unknown_model(folder):
    code = f'''
import timm
try:
    timm.create_model('local-dir:{folder}')
except RuntimeError as error:
    assert 'Unknown model (awm_resnet14_cifar)' in str(error)
else:
    raise SystemExit(1)
'''
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
    assert 'Unknown model (awm_resnet14_cifar)' in (folder / 'README.md').read_text()
    assert 'import timm_awm' in json.loads((folder / 'config.json').read_text())['pretrained_cfg']['description']


def test_description_of_anybodys_folder(folder, tmp_path):
    model = load_folder(folder)
    (tmp_path / 'config.json').write_text(json.dumps(dict(architecture=MODEL)))
    (tmp_path / 'README.md').write_text('---\nmodel-index: [\n---\n')
    assert describe(tmp_path, model).startswith(MODEL)


def test_push_needs_a_goal(folder, capsys):
    assert main(['push', str(folder)]) == 1
    assert 'Name a REPO_ID' in capsys.readouterr().err
    assert main(['push', '--all', str(folder), '--dry-run']) == 1
    assert 'no Hub folder' in capsys.readouterr().err
    assert main(['push', str(folder), '--dry-run']) == 0
    for flags in (['--license', 'mit'], ['--no-ema'], ['--checkpoint', 'best'], ['--output', 'x']):
        assert main(['push', str(folder), '--dry-run', *flags]) == 1
        assert 'is no run' in capsys.readouterr().err
