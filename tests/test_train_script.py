"""timm's own train.py, validate.py and benchmark.py, unmodified, run by timm-awm with the recipes of this repository.

No wheel of timm contains its scripts: set TIMM_TRAIN_SCRIPT to the train.py of a clone of timm.
"""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models import load_state_dict

HERE = Path(__file__).parent
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


TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def environment(cwd):
    own = {'HF_HOME': str(cwd / 'hf'), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE)}
    return {**os.environ, **own}


def run(*command, cwd, check=True, front=(sys.executable,)):
    result = subprocess.run(
        [*front, '-m', 'timm_awm', *map(str, command)], cwd=cwd, env=environment(cwd), capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def arguments(recipe, data, cwd, *args):
    return [str(arg) for arg in (
        'train', '-c', recipe, '--dataset', f'hfds/{data}', '--device', 'cpu', '--no-prefetcher', '-j', 1, '-b', 16,
        '--checkpoint-hist', 100, '--output', cwd, '--experiment', 'run', *args)]


def train(recipe, data, cwd, *args, **kwargs):
    return run(*arguments(recipe, data, cwd, *args), cwd=cwd, **kwargs)


def epochs(log):
    """Epochs and phases, as the log names them."""
    return re.findall(r'Epoch (\d+): (\w)\w+ phase', log)


def summary(folder):
    return list(csv.DictReader((folder / 'summary.csv').open()))


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


PERIOD_1 = ('--opt-kwargs', 'base=sgd', 'period=1', 'filter_bias_and_bn=False')
PERIOD_2 = ('--opt-kwargs', 'base=sgd', 'period=2', 'filter_bias_and_bn=False')


def test_alternation_and_resume(data, tmp_path):
    result = train('cifar10/awm_resnet20_cifar', data, tmp_path, *PERIOD_2, '--epochs', 4)
    folder = tmp_path / 'run'
    assert [moved(folder, epoch) for epoch in (1, 2, 3)] == ['backbone', 'merge', 'merge']
    assert epochs(result.stderr) == [('0', 'b'), ('1', 'b'), ('2', 'm'), ('3', 'm')]
    assert [row['train_phase'] for row in summary(folder)] == ['backbone', 'backbone', 'merge', 'merge']

    again = tmp_path / 'again'  # from the middle of the merge phase
    result = train(
        'cifar10/awm_resnet20_cifar', data, tmp_path, *PERIOD_2, '--epochs', 6,
        '--resume', folder / 'checkpoint-2.pth.tar', '--experiment', 'again')
    assert epochs(result.stderr) == [('3', 'm'), ('4', 'b'), ('5', 'b')]
    (again / 'checkpoint-2.pth.tar').symlink_to(folder / 'checkpoint-2.pth.tar')
    assert [moved(again, epoch) for epoch in (3, 4, 5)] == ['merge', 'backbone', 'backbone']


def test_wandb_learns_the_phase(data, tmp_path):
    (tmp_path / 'wandb.py').write_text(
        'import json\ndef init(**kwargs): pass\ndef log(row): open("rows", "a").write(json.dumps(row) + "\\n")\n')
    front = ('env', f'PYTHONPATH={tmp_path}', sys.executable)
    train('cifar10/awm_resnet20_cifar', data, tmp_path, *PERIOD_1, '--epochs', 2, '--log-wandb', front=front)
    rows = [json.loads(line) for line in (tmp_path / 'rows').read_text().splitlines()]
    assert [row['train_phase'] for row in rows] == ['backbone', 'merge']


def test_recipe_of_the_plain_control(data, tmp_path):
    train('cifar10/awm_resnet20_cifar_plain', data, tmp_path, '--epochs', 1)
    assert 'train_phase' not in summary(tmp_path / 'run')[0]
    state_dict = load_state_dict(str(tmp_path / 'run' / 'checkpoint-0.pth.tar'))
    assert not any('.merge.' in k for k in state_dict)


def test_validate(data, tmp_path):
    train('cifar10/awm_resnet20_cifar', data, tmp_path, '--epochs', 1)
    result = run(
        'validate', '--model', 'awm_resnet20_cifar', '--checkpoint', tmp_path / 'run' / 'last.pth.tar',
        '--dataset', f'hfds/{data}', '--input-key', 'img', '--target-key', 'label', '--split', 'test',
        '--device', 'cpu', '-b', 16, '--no-prefetcher', '-j', 1, '--num-classes', 10, cwd=tmp_path)
    top1 = float(summary(tmp_path / 'run')[0]['eval_top1'])
    assert json.loads(result.stdout.split('--result')[1])['top1'] == pytest.approx(top1, abs=1e-3)


def test_benchmark(tmp_path):
    result = run(
        'benchmark', '--model', 'awm_resnet14_cifar', '--device', 'cpu', '--precision', 'float32', '-b', 2,
        '--num-bench-iter', 10, '--num-warm-iter', 1, '--bench', 'train', cwd=tmp_path)
    assert '"model": "awm_resnet14_cifar"' in result.stdout and '"train_samples_per_sec"' in result.stdout


@pytest.mark.parametrize('split', [(), ('--grad-accum-steps', 2, '--clip-grad', .05)], ids=['', 'accumulation-clip'])
def test_two_processes_train_like_one(split, data, tmp_path):
    # one update an epoch of all 64 images, so that their order does not matter, and no statistics over a batch
    args = (*PERIOD_1, '--epochs', 6, '--no-aug', '--model-kwargs', 'norm_layer=groupnorm1', *split)
    share = 2 if split else 1
    train('cifar10/awm_resnet20_cifar', data, tmp_path, *args, '-b', 64 // share)
    log = train(
        'cifar10/awm_resnet20_cifar', data, tmp_path, *args, '-b', 32 // share, '--experiment', 'two',
        '--device-modules', 'ddp_on_cpu', 'ranks_equal', front=TORCHRUN)
    assert epochs(log.stderr) == [(str(i), 'bm'[i % 2]) for i in range(6)]
    assert log.stdout.count('equal after epoch') == 12
    one, two = (load_state_dict(str(tmp_path / name / 'last.pth.tar')) for name in ('run', 'two'))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def workers(agent):
    return [int(pid) for pid in Path(f'/proc/{agent}/task/{agent}/children').read_text().split()]


@pytest.mark.parametrize('args, message', [
    (('--model-kwargs', 'awm=False'), 'found no AWM merge.*--opt sgd'),
    (('--opt-kwargs', 'base=sgd', 'period=1.5'), 'period must be a whole number.*got 1.5'),
    (('--opt-kwargs', 'base=adamv', 'period=1'), "Unknown base optimizer 'adamv', the nearest is 'adam"),
])
def test_errors_reach_the_user(args, message, data, tmp_path):
    result = train('cifar10/awm_resnet20_cifar', data, tmp_path, *args, check=False)
    assert result.returncode != 0
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr[-2000:]


@pytest.mark.parametrize('front', [(sys.executable,), TORCHRUN], ids=['one', 'two-processes'])
def test_merges_and_classifier_alone(front, data, tmp_path):
    args = ('--opt-kwargs', 'base=adamw', 'train=merge+head', '--lr', .01, '--no-aug', '--epochs', 3)
    args += ('--device-modules', 'ddp_on_cpu', 'ranks_equal') if front is TORCHRUN else ()
    result = train('cifar10/awm_resnet20_cifar', data, tmp_path, *args, front=front)
    folder = tmp_path / 'run'
    assert epochs(result.stderr) == [('0', 'm'), ('1', 'm'), ('2', 'm')]
    assert [row['train_phase'] for row in summary(folder)] == ['merge'] * 3
    before, after = (load_state_dict(str(folder / f'checkpoint-{epoch}.pth.tar')) for epoch in (0, 2))
    trained = {k for k in after if '.merge.' in k or k.startswith('fc.')}
    moved = {k for k in after if not torch.equal(before[k], after[k])}
    assert {k for k in moved if 'running' not in k and 'num_' not in k} == trained
    saved = torch.load(folder / 'checkpoint-2.pth.tar', weights_only=False)
    assert len(saved['optimizer']['state']) == len(trained)

    result = train(
        'cifar10/awm_resnet20_cifar', data, tmp_path, *args, '--resume', folder / 'checkpoint-0.pth.tar',
        '--experiment', 'again', front=front)
    assert epochs(result.stderr) == [('1', 'm'), ('2', 'm')]
    if front is TORCHRUN:
        assert result.stdout.count('equal after epoch') == 4
        resumed = torch.load(tmp_path / 'again' / 'checkpoint-2.pth.tar', weights_only=False)
        for name, tensor in saved['state_dict'].items():
            assert torch.equal(tensor, resumed['state_dict'][name]), name
