import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest
import timm
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, RepoCard, constants
from huggingface_hub.errors import EntryNotFoundError
from networks import create, images
from PIL import Image
from safetensors.torch import load_file, save
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3

import timm_awm
from timm_awm import convert
from timm_awm.hub import export_run, load_folder, save_for_hub
from timm_awm.hub.export import public_args
from timm_awm_cli.main import main

MODEL = 'awm_resnet14_cifar'
NAME = f'{MODEL}.t3_c10'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / 'cache')
        yield hub


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Hub folder."""
    path = tmp_path_factory.mktemp('folders') / NAME
    save_for_hub(create(MODEL, away=True), path, pretrained_cfg=dict(tag='t3_c10', license='mit'))
    (path / 'lambda.json').write_text('{}')  # written by timm-awm analyze
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
    return json.dumps({**read_config(folder), **changes}).encode()


def read_config(folder):
    return json.loads((folder / 'config.json').read_text())


def same(model, state_dict):
    return all(torch.equal(v, state_dict[k]) for k, v in model.state_dict().items())


# --- pretrained=True

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


@pytest.mark.parametrize('name', ['awm_resnet26d.bt_in1k', 'awm_densenet121.tv_in1k'])
def test_pretrained_is_the_plain_checkpoint(name, hub, unfused):
    plain_name = name.removeprefix('awm_')
    hub.create_repo(f'timm/{plain_name}', {'model.safetensors': save(create(plain_name).state_dict())})

    def load(name, **kwargs):
        return timm.create_model(name, pretrained=True, **kwargs).eval()

    plain, x = load(plain_name), images(size=64)
    for kwargs in dict(), dict(awm=False), dict(base=plain_name):
        model = load('awm_converted' if 'base' in kwargs else f'{name}_identity', **kwargs)
        assert torch.equal(model(x), plain(x))
        assert model.pretrained_cfg['hf_hub_id'] == f'timm/{plain_name}'
        assert model.pretrained_cfg['tag'].endswith('_identity')
    few = load(f'{name}_identity', num_classes=7)
    assert few(x).shape == (2, 7) and torch.equal(few.forward_features(x), plain.forward_features(x))
    gray = load(f'{name}_identity', in_chans=1)
    assert torch.equal(gray(x[:, :1]), load(plain_name, in_chans=1)(x[:, :1]))
    features = load(f'{name}_identity', features_only=True)
    for one, other in zip(features(x), load(plain_name, features_only=True)(x)):
        assert torch.equal(one, other)


def test_pretrained_path_of_train_script(tmp_path):
    plain = timm.create_model('resnet18', num_classes=3)
    (tmp_path / 'plain.safetensors').write_bytes(save(plain.state_dict()))
    overlay = dict(file=str(tmp_path / 'plain.safetensors'), num_classes=-1)  # train.py gives this
    model = timm.create_model('awm_resnet18', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)


# --- create_model of a repository

def test_load_takes_no_pickles(hub, folder, tmp_path):
    pickled, state_dict = tmp_path / 'pytorch_model.bin', load_file(folder / 'model.safetensors')
    torch.save(state_dict, pickled)
    repo = hub.create_repo('me/net', {**files(folder), pickled.name: pickled.read_bytes()})
    assert same(timm.create_model('hf-hub:me/net', pretrained=True), state_dict)
    del repo.files['model.safetensors']  # timm would take the other
    with pytest.raises(EntryNotFoundError, match='model.safetensors'):
        timm.create_model('hf-hub:me/net', pretrained=True)
    assert not any('pytorch_model' in path for path in hub.requests)
    overlay = dict(hf_hub_filename=pickled.name)  # asked for
    assert same(timm.create_model('hf-hub:me/net', pretrained=True, pretrained_cfg_overlay=overlay), state_dict)
    own = changed(folder, tmp_path / 'own', **{'pytorch_model.bin': save(create(MODEL, seed=1).state_dict())})
    assert same(timm.create_model(f'local-dir:{own}', pretrained=True), state_dict)


# --- a folder

@pytest.mark.parametrize('make', [
    lambda: create(MODEL, away=True, num_classes=7, awm_hidden=5),
    lambda: create(MODEL, num_classes=7, awm=False),
    lambda: convert(create('resnet10t', num_classes=7)),
    lambda: create('awm_converted', away=True, base='resnet10t', num_classes=7),
], ids=['awm', 'plain', 'convert', 'converted'])
def test_saved_and_loaded(make, tmp_path):
    model = make().to(memory_format=torch.channels_last)
    save_for_hub(model, tmp_path / 'out')
    assert model.training and next(model.parameters()).is_contiguous(memory_format=torch.channels_last)  # unchanged
    config = read_config(tmp_path / 'out')
    assert config['num_classes'] == 7 and 'num_classes' not in config['model_args']  # transformers refuses it twice
    assert same(load_folder(tmp_path / 'out'), model.state_dict())
    assert len({path.stat().st_mode for path in (tmp_path / 'out').iterdir()}) == 1  # all can read the weights too


def test_a_changed_model_is_refused(tmp_path):
    model = create(MODEL)
    model.layer1[0].act1 = torch.nn.GELU()  # neither weights nor arguments tell of it
    with pytest.raises(ValueError, match='a model of other outputs than this one'):
        save_for_hub(model, tmp_path / 'out')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('missing', ['(?!conv1.weight)', '(?!.*merge)', '.*merge.*weight2', 'fc', 'layer3.1.conv2'])
@pytest.mark.parametrize('weakened', [
    dict(model_args=dict(pretrained_strict=False)), dict(num_classes=11, model_args=dict(num_classes=10)), dict()])
def test_a_part_of_the_weights(missing, weakened, folder, tmp_path):
    """Checkpoints that pretrained_strict=False or another number of classes would let pass without a word."""
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


def test_saved_again_it_says_the_same_of_its_weights(tmp_path):
    """It keeps what timm's own save_for_hf keeps; a model with other weights claims nothing of timm's."""
    cfg, names = dict(license='cc-by-nc-4.0', tag='t3', description='Mine.'), ['cat', 'dog', 'cow']
    save_for_hub(create(MODEL, num_classes=3), tmp_path / '1', pretrained_cfg=cfg, label_names=names)
    loaded = load_folder(tmp_path / '1')
    save_for_hub(loaded, tmp_path / '2')
    save_for_hf(loaded, str(tmp_path / 'timm'), safe_serialization=True)
    ours, timms = (load_folder(tmp_path / name).pretrained_cfg for name in ('2', 'timm'))
    assert {key: ours[key] for key in (*cfg, 'label_names')} == {**cfg, 'label_names': names}
    assert {k: v for k, v in ours.items() if k != 'file'} == {k: v for k, v in timms.items() if k != 'file'}
    assert card_of(tmp_path / '2').data.license == 'cc-by-nc-4.0'
    loaded.reset_classifier(4)
    save_for_hub(loaded, tmp_path / '3', pretrained_cfg=dict(tag=None))
    assert 'label_names' not in load_folder(tmp_path / '3').pretrained_cfg
    assert 'tag' not in read_config(tmp_path / '3')['pretrained_cfg']
    save_for_hub(create('awm_resnet18'), tmp_path / '4')  # for whose name timm has weights
    assert not {'tag', 'license', 'paper_ids'} & read_config(tmp_path / '4')['pretrained_cfg'].keys()


@pytest.mark.parametrize('given, expected', [
    (['cat', 'dog', 'cow'], ['cat', 'dog', 'cow']), ({0: 'cat', 1: 'dog', 2: 'cow'}, ['cat', 'dog', 'cow']),
    ({'2': 'cow'}, ['0', '1', 'cow']), (['cat'], 'There are 1 label names for 3 classes'),
    ({1: 'cat', 3: 'cow'}, 'indices 1 to 3: there are 3 classes')])
def test_label_names_in_both_forms(given, expected, tmp_path):
    model = create(MODEL, num_classes=3)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            save_for_hub(model, tmp_path / 'out', label_names=given)
        assert not any(tmp_path.iterdir())
    else:
        save_for_hub(model, tmp_path / 'out', label_names=given)
        assert load_folder(tmp_path / 'out').pretrained_cfg['label_names'] == expected


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.device('meta')], ids=str)
def torch_default(request):
    """A default for new tensors, which must stay."""
    set_default = torch.set_default_device if isinstance(request.param, torch.device) else torch.set_default_dtype
    set_default(request.param)
    yield
    new = torch.empty(0)
    set_default(None if isinstance(request.param, torch.device) else torch.float32)
    assert request.param in (new.dtype, new.device)


def test_save_under_other_defaults_of_torch(tmp_path, run, torch_default):
    with torch.device('cpu'):
        model = create(MODEL, away=True, dtype=torch.float32)
    save_for_hub(model, tmp_path / 'out')
    with torch.device('cpu'):
        saved = load_file(tmp_path / 'out' / 'model.safetensors')
    assert same(model, saved) and saved['conv1.weight'].dtype == torch.float32
    export_run(run, tmp_path / 'exported')
    assert (tmp_path / 'exported' / 'README.md').is_file()


# --- push

def push(folder, repo_id, *flags):
    return main(['push', str(folder), repo_id, *flags])


def is_published(hub, folder, repo_id='me/net'):
    """All of the folder or nothing of it, with its name in the card; whether all."""
    published = dict(hub.repos[repo_id].files) if repo_id in hub.repos else {}
    published.pop('.gitattributes', None)
    if not published:
        return False
    card = (folder / 'README.md').read_text().replace(f'hf-hub:OWNER/{folder.name}', f'hf-hub:{repo_id}')
    assert published == {**files(folder), 'README.md': card.encode()} and 'OWNER' not in card
    return True


def test_push(hub, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert push(folder, 'me/net') == push('.', 'me/net') == 0  # nothing has changed
    assert is_published(hub, folder) and hub.repos['me/net'].private and hub.repos['me/net'].commits == 1
    assert f'published: {hub.endpoint}/me/net/commit/' in capsys.readouterr().out
    assert same(timm.create_model('hf-hub:me/net', pretrained=True), load_folder(folder).state_dict())
    assert push(folder, 'me/open', '--public') == 0
    assert is_published(hub, folder, 'me/open') and not hub.repos['me/open'].private


def test_push_keeps_visibility_other_files_and_what_people_wrote(hub, folder, tmp_path, capsys):
    card = (folder / 'README.md').read_text() + 'From hf-hub:timm/resnet50.a1_in1k and hf-hub:me/base.\n'
    own = changed(folder, tmp_path / NAME, **{'README.md': card.encode()})
    there = {'notes.txt': b'mine', 'README.md': b'edited', 'summary.csv': b'of earlier weights', 'config.json': b'{}'}
    repo = hub.create_repo('me/net', there)
    assert push(own, 'me/net') == 0 and 'me/net keeps its README.md' in capsys.readouterr().out
    assert not repo.private and repo.commits == 1 and repo.files.pop('notes.txt') == b'mine'
    assert repo.files == {**files(folder), 'README.md': b'edited'}
    assert push(own, 'me/net', '--replace-card') == 0
    assert is_published(hub, own)


def test_push_with_a_space(hub, folder, capsys):
    for name, flags in ('me/net', []), ('me/open', ['--public']):
        assert push(folder, name, '--space', *flags) == 0
        assert 'Its Space: ' in capsys.readouterr().out
    for repo_id, private in ('me/net', True), ('me/open', False):
        assert hub.repos[f'spaces/{repo_id}'].private == private and is_published(hub, folder, repo_id)
        space = hub.repos[f'spaces/{repo_id}'].files
        card = RepoCard(space['README.md'].decode())
        assert (card.data.sdk, card.data.app_file, card.data.models) == ('gradio', 'app.py', [repo_id])
        assert f"explore(['hf-hub:{repo_id}'], host='0.0.0.0')" in space['app.py'].decode()
    names = {re.match(r'[\w-]+', line)[0] for line in space['requirements.txt'].decode().splitlines()}
    assert names >= {'torch', 'timm', 'gradio', 'matplotlib'} and not names & {'timm-awm', 'datasets', 'pytest'}
    package = Path(timm_awm.__file__).parent
    sources = {f'timm_awm/{path.relative_to(package)}': path.read_bytes()
               for path in package.rglob('*.*') if path.suffix in ('.py', '.cpp', '.md', '.html', '.css', '.js')}
    assert {k: v for k, v in space.items() if k.startswith('timm_awm/') and k in sources} == sources
    space.update({'README.md': b'edited', 'timm_awm/gone.py': b'of an earlier version'})
    assert push(folder, 'me/open', '--space') == 0
    space = hub.repos['spaces/me/open'].files
    assert space['README.md'] == b'edited' and 'timm_awm/gone.py' not in space


LOGIN, AGAIN = 'hf auth login', 'Try again'


@pytest.mark.parametrize('repo_id, fault, said', [
    ('me/net', ('/preupload/', 403), LOGIN), ('me/net', ('/commit/', 401), LOGIN), ('you/net', None, LOGIN),
    ('me/net', ('/commit/', 500), AGAIN), ('me/net', ('repos/create', 429), AGAIN), ('me/net', ('/commit/', 413), ''),
    ('me/net/x', None, "must be in the form 'repo_name' or 'namespace/repo_name'"),
    ('me/my net', None, 'must use alphanumeric chars'), ('net', None, 'Name OWNER/net'),
])
def test_push_refused(repo_id, fault, said, hub, folder, capsys):
    """It says what helps, and leaves nothing or all."""
    hub.faults += [fault] if fault else []
    assert push(folder, repo_id) == 1
    error = capsys.readouterr().err
    assert said in error and all(other not in error for other in (LOGIN, AGAIN) if other != said)
    assert not hub.faults and not is_published(hub, folder, repo_id)
    if fault:
        assert push(folder, repo_id) == 0 and is_published(hub, folder)


def test_push_without_network(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    assert push(folder, 'me/net') == 1
    assert AGAIN in capsys.readouterr().err


def test_push_of_no_model(hub, folder, tmp_path, capsys):
    own = changed(folder, tmp_path / 'own', **BROKEN['truncated'][0](folder))
    assert push(own, 'me/net') == 1 and 'holds no whole AWM model' in capsys.readouterr().err
    own = changed(folder, tmp_path / 'cardless', **{'README.md': None})
    assert push(own, 'me/net') == 1 and 'README.md' in capsys.readouterr().err
    assert not hub.requests


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
        opt_kwargs=dict(base='sgd', period=1), lr=0.1, model_ema=True, amp=False, amp_dtype='float16',
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


def test_export_of_a_run(run, tmp_path, capsys):
    folder = tmp_path / 'hub' / f'{MODEL}.flowers'
    assert main(['export', str(run), str(folder)]) == 0
    model = load_folder(folder)
    assert same(model, state(run, 'last.pth.tar', 'state_dict_ema'))
    config = read_config(folder)
    cfg = config['pretrained_cfg']
    assert config['model_args']['awm_hidden'] == 5 and config['model_args']['global_pool'] == 'max'
    assert cfg['mean'] == [0.1, 0.2, 0.3] and cfg['interpolation'] == 'bilinear' and cfg['input_size'] == [3, 40, 40]
    assert cfg['tag'] == 'flowers' and cfg['license'] == 'apache-2.0' and 'import timm_awm' in cfg['description']
    assert config['label_names'] == ['daisy', 'rose', 'tulip'] == list(model.pretrained_cfg['label_names'])
    assert config['num_classes'] == 3 and 'num_classes' not in config['model_args']
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['data_dir'] == 'flowers' and 'resume' not in args and args['lr'] == 0.1
    assert (folder / 'summary.csv').read_bytes() == (run / 'summary.csv').read_bytes()
    assert accuracies(folder) == [('validation', 60.0)] and card_of(folder).data.datasets is None
    text = card_of(folder).text
    assert text.index('import timm_awm') < text.index('timm.create_model') and '70.00 %' in text and '3 of 3' in text
    assert 'Unknown model (awm_resnet14_cifar)' in text and 'Jung' in text
    assert f'{sum(p.numel() for p in model.parameters()):,}' in text
    assert '| validation | 60.00 | 92.00 | train.py, epoch 2 |' in text and 'pip install' not in text
    with pytest.raises(SystemExit):
        main(['export', 'gone', str(folder)])  # the output is looked at first
    assert f'{folder} exists already' in capsys.readouterr().err


def change(run, **changes):
    """Changes arguments, in a file that an editor of Windows saves."""
    args = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8-sig'))
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, **changes}), encoding='utf-8-sig')


def test_summary_of_a_resumed_run(run, tmp_path):
    text = (run / 'summary.csv').read_text()
    (run / 'summary.csv').write_text(f'{text}{text.replace("60.0", "65.0")}')  # with its header and epochs again
    export_run(run, tmp_path / 'out')
    assert accuracies(tmp_path / 'out') == [('validation', 65.0)]


@pytest.mark.parametrize('flags, force_cpu, file, key, top1', [
    (['--checkpoint', 'best'], False, 'model_best', 'state_dict_ema', 70.0),
    (['--checkpoint', 'run/checkpoint-0.pth.tar'], False, 'checkpoint-0', 'state_dict_ema', 50.0),
    (['--no-ema'], False, 'last', 'state_dict', None),  # summary.csv is about the averaged ones,
    (['--no-ema'], True, 'last', 'state_dict', 60.0),   # unless they are on the CPU
    ([], True, 'last', 'state_dict_ema', None),
    (['--checkpoint', 'run/recovery-2-5.pth.tar'], False, 'last', 'state_dict_ema', None),
    (['--checkpoint', 'last.pth.tar'], False, 'last', 'state_dict_ema', None),  # may be of another run
])
def test_which_weights_and_only_their_results(flags, force_cpu, file, key, top1, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for copy in run / 'recovery-2-5.pth.tar', tmp_path / 'last.pth.tar':
        shutil.copyfile(run / 'last.pth.tar', copy)
    change(run, model_ema_force_cpu=force_cpu)
    assert main(['export', 'run', 'out', *flags]) == 0
    assert same(load_folder('out'), state(run, f'{file}.pth.tar', key))
    assert accuracies(tmp_path / 'out') == ([] if top1 is None else [('validation', top1)])


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
    assert read_config(tmp_path / 'out')['pretrained_cfg'].get('license') == expected
    assert card.data.base_model == ('timm/resnet18.tv_in1k' if 'model' in changes else None)


@pytest.mark.parametrize('pretrained, license', [(True, 'cc-by-nc-4.0'), (False, 'apache-2.0')])
def test_a_run_from_a_hub_folder_claims_none_of_its_results(pretrained, license, run, tmp_path):
    model = create(MODEL, num_classes=3, awm_hidden=5, global_pool='max')
    cfg = dict(tag='t3', license='cc-by-nc-4.0', description='Mine.')
    save_for_hub(model, tmp_path / 'start', pretrained_cfg=cfg, label_names=['cat', 'dog', 'cow'])
    change(run, model=f'local-dir:{tmp_path}/start', model_kwargs={}, data_dir='gone', pretrained=pretrained)
    export_run(run, tmp_path / 'out')
    config = read_config(tmp_path / 'out')
    assert config['pretrained_cfg']['license'] == license and 'label_names' not in config
    assert 'tag' not in config['pretrained_cfg'] and 'trained on gone' in config['pretrained_cfg']['description']


@pytest.mark.parametrize('value, expected', [
    ('/home/me/data', 'data'), ('/Users/Alice Smith/data/', 'data'), ('~/x/data', 'data'), ('../../me/data', 'data'),
    ('$HOME/me/data', 'data'), ('C:\\Users\\me\\data', 'data'), ('.', Path.cwd().name),
    ('https://me:SECRET@a.b/c', 'private'), ('https://a.b/w.pth?X-Amz-Signature=SECRET', 'private'),
    ("pipe:curl -H 'Authorization:Bearer SECRET' https://a.b/c", 'private')])
def test_no_path_and_no_secret_in_any_file(value, expected, run, tmp_path, capsys):
    paths = 'data', 'data_dir', 'class_map', 'initial_checkpoint', 'pretrained_path', 'output'
    changes = dict(dict.fromkeys(paths, value), dataset=f'wds/{value}', kd_model_name=f'local-dir:{value}')
    change(run, **changes, wandb_project=value)
    export_run(run, tmp_path / 'out')
    args = yaml.safe_load((tmp_path / 'out' / 'args.yaml').read_text())
    assert {key: args[key] for key in changes} == dict(
        dict.fromkeys(paths, expected), dataset=f'wds/{expected}', kd_model_name=f'local-dir:{expected}')
    assert not {'resume', 'wandb_project'} & args.keys()
    for content in files(tmp_path / 'out').values():
        assert value == '.' or not any(text in content for text in (b'SECRET', value.encode()))
    assert 'or cut to the last part of a path: class_map, data, data_dir, dataset, ' in capsys.readouterr().out


@pytest.mark.parametrize('dataset', ['hfds/uoft-cs/cifar10', 'torch/cifar10', '', None])
def test_public_names_stay(dataset):
    args = dict(dataset=dataset, model='hf-hub:me/net', lr=0.1, train_split='train[:9]', kd_model_name=None)
    assert public_args(args) == args


def test_any_argument_may_hold_a_path_or_an_address():
    args = dict(
        train_split='pipe:SECRET', val_split='/home/me/{0..9}.tar', model_kwargs=dict(overlay=dict(file='/me/x', n=3)),
        opt_kwargs=dict(log=['https://me:SECRET@a.b/c', 0.1]))
    assert public_args(args) == dict(
        train_split='private', val_split='{0..9}.tar', model_kwargs=dict(overlay=dict(file='x', n=3)),
        opt_kwargs=dict(log=['private', 0.1]))


def test_results_of_validate_script(run, tmp_path, capsys):
    (tmp_path / 'test.json').write_text(json.dumps(dict(model=MODEL, top1=61.25, top5=95.5)), encoding='utf-8-sig')
    (tmp_path / 'test.csv').write_text(f'top1,top5,model\n61.25,95.5,{MODEL}\n', encoding='utf-8-sig')
    for name in ('test.json', 'test.csv'):
        out = tmp_path / f'out-{name}'
        assert main(['export', str(run), str(out), '--results', f'test={tmp_path / name}']) == 0
        assert accuracies(out) == [('test', 61.25), ('validation', 60.0)]
        export_run(run, tmp_path / f'same-{name}', results=dict(validation=tmp_path / name))
        assert accuracies(tmp_path / f'same-{name}') == [('validation', 61.25)]
    assert main(['export', str(run), str(tmp_path / 'out'), '--results', f'test={run}/summary.csv']) == 1
    assert 'not what validate.py writes' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_label_names_given_or_unknown(run, tmp_path, capsys):
    (tmp_path / 'names.txt').write_text('a\r\nb\r\nc\r\n', encoding='utf-8-sig', newline='')  # saved by Windows
    assert main(['export', str(run), str(tmp_path / 'out'), '--label-names', str(tmp_path / 'names.txt')]) == 0
    assert read_config(tmp_path / 'out')['label_names'] == ['a', 'b', 'c']
    shutil.rmtree(tmp_path / 'private' / 'flowers' / 'validation' / 'rose')
    for name, changes in ('two-classes', {}), ('gone', dict(data_dir='gone')):
        change(run, **changes)
        export_run(run, tmp_path / name)
        assert 'Label names: not known' in capsys.readouterr().out
        assert 'label_names' not in read_config(tmp_path / name)


@pytest.mark.parametrize('changes', [dict(in_chans=1), dict(input_size=[1, 40, 40])], ids=str)
def test_export_of_a_grey_run(changes, run, tmp_path):
    """Normalised as timm's loader does it: by the mean of what is stated for the colours."""
    change(run, mean=None, std=None, **changes)
    model = create(MODEL, away=True, num_classes=3, awm_hidden=5, global_pool='max', in_chans=1)
    torch.save(dict(epoch=2, state_dict=model.state_dict()), run / 'last.pth.tar')
    export_run(run, tmp_path / 'out')
    assert 'a PIL image of mode L' in card_of(tmp_path / 'out').text
    data = timm.data.resolve_data_config({}, model=load_folder(tmp_path / 'out'))
    pixels = timm.data.create_transform(**data)(Image.new('L', (40, 40), 51))
    mean, std = (sum(model.pretrained_cfg[name]) / 3 for name in ('mean', 'std'))
    torch.testing.assert_close(pixels, torch.full((1, 40, 40), (0.2 - mean) / std))


def test_label_names_of_data_sets_of_other_kinds(run, tmp_path, monkeypatch):
    change(run, dataset='torch/image_folder')
    export_run(run, tmp_path / 'torchvision')
    assert read_config(tmp_path / 'torchvision')['label_names'] == ['daisy', 'rose', 'tulip']
    names = ['tulip', 'rose', 'daisy']
    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=names))
    data = datasets.Dataset.from_dict(dict(image=[Image.new('RGB', (2, 2))], kind=[0]), features)
    data.to_parquet(tmp_path / 'data' / 'train-00000-of-00001.parquet')
    monkeypatch.chdir(tmp_path)
    change(run, dataset='hfds/data', target_key='kind')  # a folder, though it could be the name of one on the Hub
    export_run(run, tmp_path / 'out')
    assert read_config(tmp_path / 'out')['label_names'] == names and card_of(tmp_path / 'out').data.datasets is None


@pytest.mark.parametrize('break_it, said', [
    (lambda run: (run / 'args.yaml').unlink(), 'is no run of train.py'),
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
