"""timm's own train.py and validate.py, unmodified, run by timm-awm with the recipes of this repository.

No wheel of timm contains its scripts: set TIMM_TRAIN_SCRIPT to the train.py of a clone of timm.
"""
import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from timm.models import load_state_dict

HERE = Path(__file__).parent
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TRAIN, reason="NOT TESTED: timm's real train.py. Clone timm at the tag of the installed version and set "
                          'TIMM_TRAIN_SCRIPT to its train.py'),
]


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


TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def environment(cwd):
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get('PYTHONPATH')]))
    own = {'HF_HOME': str(cwd / 'hf'), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    return {**os.environ, **own}


def run(*command, cwd, check=True, front=(sys.executable,)):
    result = subprocess.run(
        [*front, '-m', 'timm_awm', *map(str, command)], cwd=cwd, env=environment(cwd), capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def arguments(recipe, data, cwd, *args):
    return [str(arg) for arg in (
        'train', '-c', recipe, '--dataset', f'hfds/{data}', '--device', 'cpu', '-j', 1, '-b', 16,
        '--train-split', 'train', '--val-split', 'test',
        '--checkpoint-hist', 100, '--output', cwd, '--experiment', 'run', *args)]


def train(recipe, data, cwd, *args, **kwargs):
    return run(*arguments(recipe, data, cwd, *args), cwd=cwd, **kwargs)


def epochs(log):
    """Epochs and phases, as the log names them."""
    return re.findall(r'Epoch (\d+): (\w)\w+ phase', log)


def summary(folder):
    return list(csv.DictReader((folder / 'summary.csv').open()))


PLAIN = ('--opt', 'sgd', '--model-kwargs', 'awm=False', '--opt-kwargs', 'filter_bias_and_bn=False')
PERIOD_2 = ('--opt-kwargs', 'base=sgd', 'period=2', 'filter_bias_and_bn=False')


def test_alternation(data, tmp_path):
    result = train('cifar10/awm_resnet20_cifar', data, tmp_path, *PERIOD_2, '--epochs', 4)
    assert epochs(result.stderr) == [('0', 'b'), ('1', 'b'), ('2', 'm'), ('3', 'm')]
    assert [row['train_phase'] for row in summary(tmp_path / 'run')] == ['backbone', 'backbone', 'merge', 'merge']
    before, after = (load_state_dict(str(tmp_path / f'run/checkpoint-{epoch}.pth.tar')) for epoch in (1, 2))
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    statistics = {k for k in after if 'running' in k or 'num_batches' in k}
    assert changed == statistics | {k for k in after if '.merge.' in k}  # BatchNorm's follow in both phases


def test_plain_control_and_validate(data, tmp_path):
    train('cifar10/awm_resnet20_cifar', data, tmp_path, *PLAIN, '--epochs', 1)
    row = summary(tmp_path / 'run')[0]
    assert 'train_phase' not in row
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    assert not any('.merge.' in k for k in load_state_dict(str(checkpoint)))
    result = run(
        'validate', '--model', 'awm_resnet20_cifar', '--model-kwargs', 'awm=False', '--checkpoint', checkpoint,
        '--dataset', f'hfds/{data}', '--input-key', 'img', '--target-key', 'label', '--split', 'test',
        '--device', 'cpu', '-b', 16, '-j', 1, '--num-classes', 10, cwd=tmp_path)
    assert json.loads(result.stdout.split('--result')[1])['top1'] == pytest.approx(float(row['eval_top1']), abs=1e-3)


@pytest.fixture
def float32(tmp_path):
    recipe = tmp_path / 'float32.yaml'
    text = (HERE.parent / 'recipes/cifar10_short/awm_resnet14_cifar.yaml').read_text()
    recipe.write_text(text.replace('amp: true', 'amp: false'))
    return recipe


# an epoch is one update by all 64 images, so that their order does not matter, and no statistics over a batch
ONE_UPDATE = ('--no-aug', '--model-kwargs', 'norm_layer=groupnorm1', '--clip-grad', .05)


def test_two_processes_train_like_one(data, float32, tmp_path):
    args = ('--opt-kwargs', 'base=sgd', 'period=1', 'filter_bias_and_bn=False', '--epochs', 6, *ONE_UPDATE,
            '--grad-accum-steps', 2)
    train(float32, data, tmp_path, *args, '-b', 32)
    log = train(
        float32, data, tmp_path, *args, '-b', 16, '--experiment', 'two',
        '--device-modules', 'ddp_on_cpu', front=TORCHRUN)
    assert log.stderr.count('timm-awm runs') == 1
    assert epochs(log.stderr) == [(str(i), 'bm'[i % 2]) for i in range(6)]
    one, two = (load_state_dict(str(tmp_path / name / 'last.pth.tar')) for name in ('run', 'two'))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_a_killed_run_goes_on_in_the_right_phase(data, float32, tmp_path):
    args = (*PERIOD_2, *ONE_UPDATE, '-b', 64, '--epochs', 8, '--resume', 'auto')
    train(float32, data, tmp_path, *args)
    killed = arguments(float32, data, tmp_path, *args, '--experiment', 'killed')
    with subprocess.Popen(
            [sys.executable, '-m', 'timm_awm', *killed], cwd=tmp_path, env=environment(tmp_path),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / 'killed' / 'checkpoint-2.pth.tar').exists() and process.poll() is None:
            time.sleep(.01)
        process.kill()
    log = run(*killed, cwd=tmp_path).stderr
    first = int(epochs(log)[0][0])
    assert first >= 3 and epochs(log) == [(str(i), 'bbmm'[i % 4]) for i in range(first, 8)]
    one, two = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=False) for name in ('run', 'killed'))
    assert two['epoch'] == 7 and two['optimizer']['param_groups'] == one['optimizer']['param_groups']


def test_errors_reach_the_user(data, tmp_path):
    result = train('cifar10/awm_resnet20_cifar', data, tmp_path, '--model-kwargs', 'awm=False', check=False)
    assert result.returncode != 0
    assert re.search('found no merge parameters.*--opt sgd', result.stderr.splitlines()[-1]), result.stderr[-2000:]
