"""Every update of timm's real train.py under the switches that could disturb the phases, one of each kind."""
import copy
import gc
import importlib.util
import os
import sys
from typing import NamedTuple

import pytest
import timm
import torch
from networks import create
from PIL import Image
from test_optim import same
from timm.data import transforms_factory
from timm.models import save_for_hf
from timm.utils import unwrap_model

from timm_awm import train_script

TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')

pytestmark = pytest.mark.skipif(
    not TRAIN, reason="NOT TESTED: timm's real train.py under its switches. Clone timm at the tag of the installed "
                      'version and set TIMM_TRAIN_SCRIPT to its train.py')

BATCHES = 5  # an epoch
# later arguments win
COMMON = (
    '--model awm_resnet14_cifar --num-classes 10 --device cpu -j 1 -b 8 --epochs 4 '
    '--opt alternating --opt-kwargs base=sgd period=1 --lr .1 --weight-decay .01 --warmup-epochs 0 --experiment run ')


class Row(NamedTuple):
    name: str
    args: str = ''  # of train.py, besides COMMON; {data} is the folder of the images and networks
    phases: str = 'bmbm'  # of all epochs: backbone, merge or joint
    start: int = 0  # the first epoch that is run
    again: str = ''  # arguments of a second run, besides those of the first, whose folder is {run}
    again_start: int = 0  # the first epoch of the second run
    frozen: tuple = ()  # beginnings of the names of what train.py itself keeps frozen
    slow: bool = False


TWO = '--epochs 6 --opt-kwargs base=sgd period=2 '

TABLE = [
    Row('clip-ema', '--clip-grad .05 --model-ema --model-ema-decay .5'),
    Row('densenet-joint', '--model awm_densenet22_cifar --opt-kwargs base=sgd period=0', 'jjjj'),
    Row('schedule-by-metric', '--sched plateau --patience-epochs 0 --decay-rate .5'),
    Row('schedule-by-update-warmup', '--sched-on-updates --warmup-epochs 1 --warmup-lr 0'),
    Row('accumulation-clip-by-layer', '--grad-accum-steps 2 --clip-grad .01 --clip-mode agc'),
    Row('layer-decay', '--layer-decay .5 --layer-decay-no-opt-scale .1', frozen=('conv1', 'bn1', 'layer1', 'layer2.0')),
    Row('distillation', '--kd-model-name local-dir:{data}/awm_densenet22_cifar --kd-distill-type feature'),
    Row('second-order-base', '--lr .01 --opt-kwargs base=adahessian period=1'),
    Row('start-epoch', TWO + '--start-epoch 3', 'bbmmbb', 3),
    Row('resume-start-epoch', TWO + '--sched-on-updates', 'bbmmbb',
        again='--resume {run}/checkpoint-1.pth.tar --start-epoch 3', again_start=3),
    Row('no-resume-opt', TWO, 'bbmmbb', again='--resume {run}/checkpoint-3.pth.tar --no-resume-opt', again_start=4),
    Row('lookahead-merge-1-resume', '--epochs 6 --opt lookahead_alternating --opt-kwargs base=lamb period=2 '
        'merge_period=1 --lr .01 --val-interval 3', 'bbmbbm',
        again='--resume {run}/checkpoint-2.pth.tar', again_start=3),
    Row('compile-checkpointing-bfloat16',
        '--torchcompile aot_eager --grad-checkpointing --amp --amp-dtype bfloat16', slow=True),
]


@pytest.fixture(scope='module')
def train_py():
    """timm's train.py as the running script, in this process."""
    spec = importlib.util.spec_from_file_location('train_py', TRAIN)
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, '__main__', script)
        patch.setattr(transforms_factory, 'transforms_imagenet_train', transforms_factory.transforms_imagenet_train)
        for task in vars(timm.task).values():
            if 'prepare_distributed' in getattr(task, '__dict__', ()):
                patch.setattr(task, 'prepare_distributed', task.prepare_distributed)
        spec.loader.exec_module(script)
        train_script.install()
        yield script


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images, and networks that are past the identity start, where a merge's W1 has no gradient yet."""
    folder = tmp_path_factory.mktemp('switches')
    torch.manual_seed(0)
    for split, size in (('train', BATCHES * 8), ('validation', 8)):
        for i, image in enumerate(torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8)):
            path = folder / split / str(i % 10) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    for name in ('awm_resnet14_cifar', 'awm_densenet22_cifar'):
        save_for_hf(create(name, away=True), folder / name, safe_serialization=True)
    return folder


def watched(train_one_epoch, notes):
    """Writes down what each step of the optimizer has changed."""
    def with_notes(epoch, model, loader, optimizer, *args, **kwargs):
        def step(*args):
            params = dict(unwrap_model(model).named_parameters())
            state = getattr(optimizer, '_base_optimizer', optimizer).state  # inside a Lookahead
            before = {k: copy.deepcopy((p, state.get(p, {}))) for k, p in params.items()}
            gradients = {k for k, p in params.items() if p.grad is not None}
            result = type(optimizer).step(optimizer, *args)
            notes.append(dict(
                epoch=epoch, lr=optimizer.param_groups[0]['lr'], names=set(params), gradients=gradients,
                moved={k for k, p in params.items() if not torch.equal(p, before[k][0])},
                state={k for k, p in params.items() if not same(state.get(p, {}), before[k][1])}))
            return result

        optimizer.step = step
        return train_one_epoch(epoch, model, loader, optimizer, *args, **kwargs)

    return with_notes


def train(train_py, row, folder, output, again=False):
    """Notes and arguments of a row's first or second run."""
    argv = f'{COMMON} --data-dir {folder} --output {output} {row.args}'.format(data=folder).split()
    argv += ['--initial-checkpoint', str(folder / train_py.parser.parse_args(argv).model / 'model.safetensors')]
    if again:
        argv += f'{row.again} --experiment again'.format(run=output / 'run').split()
    notes = []
    gc.collect()  # optimizers of earlier runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', *argv])
        patch.setattr(train_py, 'train_one_epoch', watched(train_py.train_one_epoch, notes))
        train_py.main()
    torch._dynamo.reset()
    return notes, train_py.parser.parse_args(argv)


@pytest.mark.parametrize('row', [
    pytest.param(row, id=row.name, marks=pytest.mark.slow if row.slow else ()) for row in TABLE])
def test_every_update(row, train_py, folder, tmp_path):
    for again in [False, True] if row.again else [False]:
        notes, args = train(train_py, row, folder, tmp_path, again)
        epochs = range(row.again_start if again else row.start, len(row.phases))
        updates = -(-BATCHES // args.grad_accum_steps)
        assert [note['epoch'] for note in notes] == [epoch for epoch in epochs for _ in range(updates)]
        trained = {k for k in notes[0]['names'] if not k.startswith(row.frozen or '-')}
        merge = {k for k in trained if '.merge.' in k}
        sides = dict(b=trained - merge, m=merge, j=trained)
        for i, note in enumerate(notes):
            active = sides[row.phases[note['epoch']]]
            for what in ('gradients', 'state', 'moved'):
                expected = set() if what == 'moved' and note['lr'] == 0 else active
                assert note[what] == expected, f'{what} of update {i}: not alike {sorted(note[what] ^ expected)}'
