"""timm's own train.py and validate.py, unmodified, with the recipes of this repository.

No wheel of timm contains its scripts: set TIMM_TRAIN_SCRIPT to the train.py of a clone of timm.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models import load_state_dict

RECIPES = Path(__file__).parents[1] / 'recipes'
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')

pytestmark = pytest.mark.skipif(
    not TRAIN, reason="NOT TESTED: timm's real train.py. Clone timm at the tag of the installed version and set "
                      'TIMM_TRAIN_SCRIPT to its train.py')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A tiny data set with the files and columns of uoft-cs/cifar10."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PIL

    folder = tmp_path_factory.mktemp('cifar10')
    torch.manual_seed(0)
    for split, size in (('train', 64), ('test', 32)):
        images = [PIL.fromarray(x.numpy()) for x in torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8)]
        features = Features(dict(img=Image(), label=ClassLabel(num_classes=10)))
        labels = [i % 10 for i in range(size)]
        Dataset.from_dict(dict(img=images, label=labels), features).to_parquet(folder / f'{split}-0.parquet')
    return folder


def run(*command, cwd, check=True):
    env = {**os.environ, 'HF_HOME': str(cwd / 'hf'), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def train(recipe, data, cwd, *args, **kwargs):
    return run(
        TRAIN, '-c', RECIPES / recipe, '--dataset', f'hfds/{data}', '--device', 'cpu', '--no-prefetcher', '-j', 1,
        '-b', 16, '--checkpoint-hist', 10, '--output', cwd, '--experiment', 'run', *args, cwd=cwd, **kwargs)


def moved(folder, epoch):
    """Which sides of the network one epoch has changed, from the checkpoints before and after it."""
    before, after = (load_state_dict(str(folder / f'checkpoint-{e}.pth.tar')) for e in (epoch - 1, epoch))
    parameters = {k for k in after if 'running' not in k and 'num_batches' not in k}
    changed = {k for k in parameters if not torch.equal(before[k], after[k])}
    merge = {k for k in parameters if '.merge.' in k}
    sides = {'merge': merge, 'backbone': parameters - merge}
    assert all(changed & side in (set(), side) for side in sides.values())  # all of a side or nothing of it
    assert any(not torch.equal(before[k], after[k]) for k in after if 'running_mean' in k)
    return ' and '.join(name for name, side in sides.items() if side <= changed)


def test_alternation_and_resume(data, tmp_path):
    period = ('--opt-kwargs', 'base=sgd', 'period=2', 'filter_bias_and_bn=False')
    result = train('cifar10/awm_resnet20_cifar.yaml', data, tmp_path, *period, '--epochs', 4)
    folder = tmp_path / 'run'
    assert [moved(folder, epoch) for epoch in (1, 2, 3)] == ['backbone', 'merge', 'merge']
    log = [line.split(',')[0] for line in result.stderr.splitlines() if line.startswith('Epoch ')]
    assert log == [f'Epoch {i}: {phase} phase' for i, phase in enumerate(['backbone'] * 2 + ['merge'] * 2)]

    again = tmp_path / 'again'  # from the middle of the merge phase
    result = train(
        'cifar10/awm_resnet20_cifar.yaml', data, tmp_path, *period, '--epochs', 6,
        '--resume', folder / 'checkpoint-2.pth.tar', '--experiment', 'again')
    log = [line.split(',')[0] for line in result.stderr.splitlines() if line.startswith('Epoch ')]
    assert log == [f'Epoch {i}: {phase} phase' for i, phase in zip((3, 4, 5), ('merge', 'backbone', 'backbone'))]
    (again / 'checkpoint-2.pth.tar').symlink_to(folder / 'checkpoint-2.pth.tar')
    assert [moved(again, epoch) for epoch in (3, 4, 5)] == ['merge', 'backbone', 'backbone']


def test_recipe_of_the_plain_control(data, tmp_path):
    train('cifar10/awm_resnet20_cifar_plain.yaml', data, tmp_path, '--epochs', 1)
    state_dict = load_state_dict(str(tmp_path / 'run' / 'checkpoint-0.pth.tar'))
    assert not any('.merge.' in k for k in state_dict)


def test_validate(data, tmp_path):
    script = str(Path(TRAIN).with_name('validate.py'))
    train('cifar10/awm_resnet20_cifar.yaml', data, tmp_path, '--epochs', 1)
    result = run(
        '-c', 'import runpy, timm_awm; runpy.run_path(%r, run_name="__main__")' % script,
        '--model', 'awm_resnet20_cifar', '--checkpoint', tmp_path / 'run' / 'last.pth.tar', '--device', 'cpu',
        '--dataset', f'hfds/{data}', '--input-key', 'img', '--target-key', 'label', '--split', 'test', '-b', 16,
        '--no-prefetcher', '-j', 1, '--num-classes', 10, cwd=tmp_path)
    trained = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    top1 = float(dict(zip(trained[0].split(','), trained[1].split(',')))['eval_top1'])
    assert f'"top1": {top1:.4g}'.rstrip('0').rstrip('.') in result.stdout


@pytest.mark.parametrize('args, message', [
    (('--dataset', 'hfds//no/such'), "data folder '/no/such' does not exist"),
    (('--model-kwargs', 'awm=False'), 'found no AWM merge.*--opt sgd'),
    (('--opt-kwargs', 'base=sgd', 'period=1.5'), 'period must be a whole number.*got 1.5'),
    (('--opt-kwargs', 'base=adamv', 'period=1'), "Unknown base optimizer 'adamv', the nearest is 'adam"),
])
def test_errors_reach_the_user(args, message, data, tmp_path):
    result = train('cifar10/awm_resnet20_cifar.yaml', data, tmp_path, *args, check=False)
    assert result.returncode != 0
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr[-2000:]
