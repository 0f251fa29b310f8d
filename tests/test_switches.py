"""The epoch clock and the freezing under every switch of train.py: in timm's real train.py, and, for machines without
it, in a loop of our own that makes the same calls."""
import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recorder
import timm
import torch
import training_loop
from PIL import Image
from switches import COMMON, TABLE, Row, check
from timm.models import save_for_hf

import timm_awm

HERE = Path(__file__).parent
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')
needs_script = pytest.mark.skipif(
    not TRAIN, reason="NOT TESTED: timm's real train.py under every switch. Clone timm at the tag of the installed "
                      'version and set TIMM_TRAIN_SCRIPT to its train.py')
needs_wsd = pytest.mark.skipif(
    not hasattr(timm.scheduler, 'WSDLRScheduler'), reason=f'timm {timm.__version__} has no scheduler wsd')


def rows(script):
    return [
        pytest.param(row, id=row.name, marks=needs_wsd if row.name == 'wsd' else ())
        for row in TABLE if script or not row.script_only]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images, and networks that are past the identity start, where a merge's W1 has no gradient yet."""
    folder = tmp_path_factory.mktemp('switches')
    torch.manual_seed(0)
    for split, size in (('train', training_loop.BATCHES * 8), ('validation', 8)):
        for i, image in enumerate(torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8)):
            path = folder / split / str(i % 10) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    for name in ('awm_resnet14_cifar', 'awm_densenet22_cifar'):
        model = timm.create_model(name)
        for k, p in model.named_parameters():
            if k.endswith('mix.weight2'):
                torch.nn.init.normal_(p, std=.5)
        save_for_hf(model, folder / name, safe_serialization=True)
    return folder


def command(row, folder, output, again=False):
    """The arguments of a row's first or second run."""
    argv = f'{COMMON} --data-dir {folder} --output {output} {row.args}'.format(data=folder).split()
    if not row.identity:
        model = training_loop.parser.parse_args(argv).model
        argv += ['--initial-checkpoint', str(folder / model / 'model.safetensors')]
    return argv + (f'{row.again} --experiment again'.format(run=output / 'run').split() if again else [])


def run_loop(argv):
    notes = []
    training_loop.main(argv, recorder.Recorder(training_loop.train_one_epoch, notes.append))
    return notes


def run_script(argv, cwd):
    record = cwd / 'notes'
    record.unlink(missing_ok=True)
    env = {
        **os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'TIMM_AWM_RECORD': str(record),
        'PYTHONPATH': os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])}
    result = subprocess.run(
        [sys.executable, TRAIN, '--device-modules', 'timm_awm', 'recorder', *argv],
        cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return list(map(json.loads, record.read_text().splitlines()))


@needs_script
@pytest.mark.parametrize('row', rows(script=True))
def test_train_script(row, folder, tmp_path):
    for again in [False, True] if row.again else [False]:
        argv = command(row, folder, tmp_path, again)
        check(run_script(argv, tmp_path), row, argv, again)


@pytest.mark.parametrize('row', rows(script=False))
def test_training_loop(row, folder, tmp_path):
    for again in [False, True] if row.again else [False]:
        argv = command(row, folder, tmp_path, again)
        check(run_loop(argv), row, argv, again)
    torch._dynamo.reset()


@needs_script
def test_arguments_mean_the_same_to_the_script(folder, tmp_path):
    spec = importlib.util.spec_from_file_location('timm_train_script', TRAIN)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for row in TABLE:
        for again in (False, True):
            argv = command(row, folder, tmp_path, again)
            theirs = vars(script.parser.parse_args(argv))
            ours = vars(training_loop.parser.parse_args(argv))
            assert ours == {k: theirs[k] for k in ours}


PLAIN = Row('plain', '--epochs 2 --clip-grad .05 --model-ema --model-ema-decay .5', phases='bm')


@pytest.fixture(scope='module')
def plain(folder, tmp_path_factory):
    argv = command(PLAIN, folder, tmp_path_factory.mktemp('plain'))
    return run_loop(argv), argv


MERGE, BACKBONE = 'layer1.0.merge.mix.weight1', 'conv1.weight'


@pytest.mark.parametrize('note, key, value', [
    (3, 'moved', lambda names: names + [MERGE]),
    (3, 'moved', lambda names: names[1:]),
    (9, 'moved', lambda names: names + [BACKBONE]),
    (3, 'state', lambda names: names + [MERGE]),
    (3, 'gradients', lambda names: names + [MERGE]),
    (3, 'buffers', lambda names: names[1:]),
    (3, 'clip', lambda clip: {**clip, 'names': clip['names'] + [MERGE]}),
    (3, 'clip', lambda clip: {**clip, 'norm': clip['norm'] / 2}),
    (3, 'clip', lambda clip: None),
    (3, 'lr', lambda lr: [lr[0], lr[1] / 2]),
    (3, 'clock', lambda clock: clock + 1),
    (3, 'kind', lambda kind: 'skip'),
    (3, 'ema_error', lambda error: 1e-3),
    (0, 'has_ema', lambda has: not has),
    (6, 'moved', lambda names: [BACKBONE]),  # at an epoch's end
    (7, 'moved', lambda names: [BACKBONE]),  # between epochs
])
def test_the_check_fails_for_a_wrong_note(note, key, value, plain):
    notes, argv = copy.deepcopy(plain)
    check(notes, PLAIN, argv)
    assert [n['kind'] for n in notes[:8]] == ['begin'] + ['step'] * 5 + ['end', 'begin']
    notes[note][key] = value(notes[note][key])
    with pytest.raises(AssertionError):
        check(notes, PLAIN, argv)


@pytest.mark.parametrize('phases', ['bb', 'mb', 'jj'])
def test_the_check_fails_for_other_phases(phases, plain):
    with pytest.raises(AssertionError):
        check(plain[0], Row('plain', phases=phases), plain[1])


@pytest.mark.parametrize('breakage', ['bare base', 'late clock', 'no freeze', 'other epoch'])
def test_the_check_fails_for_a_broken_optimizer(breakage, folder, tmp_path, monkeypatch):
    argv = command(PLAIN, folder, tmp_path)
    if breakage == 'bare base':
        argv += ['--opt', 'sgd', '--opt-kwargs']
    elif breakage == 'no freeze':  # its steps are right, but the gradients are computed and clipped
        monkeypatch.setattr(timm_awm.optim.Alternating, '_freeze', lambda self: None)
    else:
        set_epoch = timm_awm.optim.set_epoch
        other = (lambda epoch: max(0, epoch - 1)) if breakage == 'late clock' else (lambda epoch: epoch + 2)
        monkeypatch.setattr(timm_awm.optim, 'set_epoch', lambda epoch: set_epoch(other(epoch)))
    notes = run_loop(argv)
    with pytest.raises(AssertionError):
        check(notes, PLAIN, argv)
