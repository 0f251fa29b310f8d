"""The switches of train.py that could disturb the phases, and what must hold at every update under each of them."""
import argparse
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from recorder import OVERFLOWS
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

BATCHES = 5  # an epoch
# later arguments win
COMMON = (
    '--model awm_resnet14_cifar --num-classes 10 --device cpu -j 1 -b 8 --epochs 4 '
    '--opt alternating --opt-kwargs base=sgd period=1 --lr .1 --weight-decay .01 --warmup-epochs 0 --experiment run ')


@dataclass(frozen=True)
class Row:
    """
    Args:
        name: Says what is switched on.
        args: Arguments of train.py, besides COMMON; {data} is the folder of the images and networks.
        phases: The phase of every epoch: backbone, merge or joint.
        start: The first epoch that is run.
        again: Arguments of a second run, besides those of the first, whose folder is {run}.
        again_start: The first epoch of the second run.
        saved: The last epoch whose optimizer state the second run has, if any.
        frozen: Beginnings of the names of what train.py itself keeps frozen.
    """
    name: str
    args: str = ''
    phases: str = 'bmbm'
    start: int = 0
    again: str = ''
    again_start: int = 0
    saved: Optional[int] = None
    frozen: Tuple[str, ...] = ()
    slow: bool = False


PERIOD2 = '--epochs 6 --opt-kwargs base=sgd period=2 '
TWO = dict(phases='bbmmbb')

TABLE = [
    Row('clip-ema', '--clip-grad .05 --model-ema --model-ema-decay .5'),
    Row('joint', '--opt-kwargs base=sgd period=0', phases='jjjj'),
    Row('densenet', '--model awm_densenet22_cifar'),
    # schedulers
    Row('step', '--sched step --decay-epochs 1 --decay-rate .5'),
    Row('plateau', '--sched plateau --patience-epochs 0 --decay-rate .5'),
    Row('wsd', '--sched wsd --decay-epochs 1'),
    Row('poly-cooldown-warmup-prefix',
        '--sched poly --decay-rate .5 --cooldown-epochs 1 --warmup-epochs 1 --warmup-prefix', phases='bmbmbm'),
    Row('on-updates', '--sched-on-updates --warmup-epochs 1 --warmup-lr 0'),
    # gradients
    Row('accumulation', '--grad-accum-steps 2'),
    Row('clip-value', '--clip-grad .001 --clip-mode value'),
    Row('layer-decay', '--layer-decay .5 --layer-decay-no-opt-scale .1', frozen=('conv1', 'bn1', 'layer1', 'layer2.0')),
    # the model
    Row('kd-feature', '--kd-model-name local-dir:{data}/awm_densenet22_cifar --kd-distill-type feature'),
    # bases
    Row('muon', '--lr .01 --opt-kwargs base=muon period=1'),
    Row('adahessian', '--lr .01 --opt-kwargs base=adahessian period=1'),
    # other epochs than 0, 1, 2, ...
    Row('start-epoch', PERIOD2 + '--start-epoch 3', start=3, **TWO),
    Row('resume-at-change', PERIOD2, again='--resume {run}/checkpoint-3.pth.tar', again_start=4, saved=3, **TWO),
    Row('resume-start-epoch', PERIOD2 + '--sched-on-updates',
        again='--resume {run}/checkpoint-1.pth.tar --start-epoch 3', again_start=3, saved=1, **TWO),
    # together
    Row('accumulation-clip-on-updates-resume',
        PERIOD2 + '--grad-accum-steps 2 --clip-grad .05 --sched-on-updates --warmup-epochs 1 --warmup-lr .01',
        again='--resume {run}/checkpoint-2.pth.tar', again_start=3, saved=2, **TWO),
    Row('lookahead-ema-val-interval-resume',
        PERIOD2 + '--opt lookahead_alternating --model-ema --model-ema-decay .9 --model-ema-force-cpu --val-interval 3',
        again='--resume {run}/checkpoint-2.pth.tar', again_start=3, saved=2, **TWO),
    Row('float16-accumulation-clip-lamb-merge-1',
        '--amp --grad-accum-steps 2 --clip-grad .01 --lr .01 --epochs 5 '
        '--opt-kwargs base=lamb period=2 merge_period=1', phases='bbmbb', slow=True),
    Row('compile-checkpointing-bfloat16-agc-accumulation',
        '--torchcompile aot_eager --grad-checkpointing --amp --amp-dtype bfloat16 --clip-grad .01 --clip-mode agc '
        '--grad-accum-steps 2', slow=True),
    Row('kd-adamw-layer-decay-no-resume-opt',
        PERIOD2 + '--kd-model-name local-dir:{data}/awm_resnet14_cifar --lr .01 --layer-decay .7 '
        '--opt-kwargs base=adamw period=2',
        again='--resume {run}/checkpoint-2.pth.tar --no-resume-opt', again_start=3, **TWO),
]


def learning_rates(args: argparse.Namespace, start: int, updates: int) -> Iterator[Tuple[int, Optional[float]]]:
    """The epoch and learning rate of every update, from timm's scheduler with torch's SGD; None if it depends on the
    training."""
    if args.sched == 'plateau':
        yield from ((epoch, None) for epoch in range(start, args.epochs) for _ in range(updates))
        return
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    if start:
        scheduler.step_update(start * updates) if args.sched_on_updates else scheduler.step(start)
    for epoch in range(start, epochs):
        for update in range(updates):
            yield epoch, optimizer.param_groups[0]['lr']
            scheduler.step_update(epoch * updates + update + 1)
        scheduler.step(epoch + 1)


def expected_kinds(args: argparse.Namespace, lrs: List[Tuple[int, Any]], updates: int) -> List[Tuple[int, str]]:
    kinds = []
    for epoch in sorted({epoch for epoch, _ in lrs}):
        overflows = [args.amp and args.amp_dtype == 'float16' and (epoch, i) in OVERFLOWS for i in range(updates)]
        kinds += [(epoch, kind) for kind in ['begin', *('skip' if x else 'step' for x in overflows), 'end']]
    return kinds


def check(notes: List[Dict[str, Any]], row: Row, args: argparse.Namespace, again: bool = False) -> None:
    """Compares the notes of one run with the table, exactly: no name may be missing, none may be too many."""
    updates = -(-BATCHES // args.grad_accum_steps)
    lrs = list(learning_rates(args, row.again_start if again else row.start, updates))
    assert [(n['epoch'], n['kind']) for n in notes] == expected_kinds(args, lrs, updates)
    assert len(row.phases) == lrs[-1][0] + 1

    first = notes[0]
    names = set(first['parameters'])
    frozen = {k for k in names if k.startswith(row.frozen or '-')}
    assert bool(frozen) == bool(row.frozen)
    assert_same(first['frozen'], frozen, 'frozen by train.py')
    merge = {k for k in names if '.merge.' in k} - frozen
    sides = dict(b=names - frozen - merge, m=merge, j=names - frozen)
    assert merge and sides['b']
    assert (first['has_ema'], first['ema_differs']) == (args.model_ema, args.model_ema and again)
    if again:
        stateful = [sides[phase] for phase in row.phases[:0 if row.saved is None else row.saved + 1]]
        assert_same(first['stateful'], set().union(*stateful), 'resumed with state')

    by_update = iter(lrs)
    previous_lr = args.lr
    for i, note in enumerate(notes):
        epoch, kind, phase = note['epoch'], note['kind'], row.phases[note['epoch']]
        where = f'epoch {epoch}, note {i}, {kind}'
        active = sides[phase]
        assert kind == 'begin' or note['ema_error'] < 1e-6, where
        if kind in ('begin', 'end'):
            # between updates nothing moves, and no statistics but in training
            for what in ('moved', 'state', 'buffers'):
                assert_same(note[what], (), f'{where}: {what}')
            continue
        assert_same(note['buffers'], first['all_buffers'], f'{where}: BatchNorm statistics')
        _, lr = next(by_update)
        if kind == 'skip':
            assert not note['moved'] and not note['state'], where
            continue
        assert note['clock'] == epoch, where
        assert_same(note['gradients'], active, f'{where}: gradients')
        assert_same(note['state'], active, f'{where}: state')
        assert_same(note['moved'], () if lr == 0 else active, f'{where}: moved')
        check_clipping(note['clip'], args, active, where)
        for group_lr in note['lr']:
            if lr is None:
                assert any(abs(group_lr - previous_lr * x) < 1e-9 for x in (1, args.decay_rate)), where
            else:
                assert abs(group_lr - lr) < 1e-9, where
        previous_lr = note['lr'][0]
    if args.sched == 'plateau':
        assert previous_lr < args.lr


def check_clipping(clip: Optional[Dict[str, Any]], args: argparse.Namespace, active: Iterable[str], where: str) -> None:
    if args.clip_grad is None:
        assert clip is None, where
        return
    assert clip is not None, where
    head = ('fc.',) if args.clip_mode == 'agc' else ()
    assert_same(clip['names'], (k for k in active if not k.startswith(head)), f'{where}: clipped')
    if args.clip_mode == 'norm':  # small enough to be reached always, and by one side alone
        assert abs(clip['norm'] / args.clip_grad - 1) < 1e-3, where
    elif args.clip_mode == 'value':
        assert clip['largest'] <= args.clip_grad * (1 + 1e-6), where


def assert_same(names: Iterable[str], expected: Iterable[str], what: str) -> None:
    names, expected = set(names), set(expected)
    assert names == expected, f'{what}: missing {sorted(expected - names)}, unexpected {sorted(names - expected)}'
