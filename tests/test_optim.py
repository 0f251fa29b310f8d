import copy
import gc
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from networks import create, images
from timm.optim import Lamb, create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.flop_counter import FlopCounterMode

from timm_awm import optim
from timm_awm.layers import SumMerge
from timm_awm.optim import Alternating, PhaseSchedule

STEPS_PER_EPOCH = 3


class Net(nn.Module):
    """A small residual network with two merges, without BatchNorm: its function is its parameters alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.merges = nn.ModuleList(SumMerge(8, 4) for _ in range(2))
        self.fc = nn.Linear(8, 5)
        for merge in self.merges:
            nn.init.normal_(merge.mix.weight2, std=0.5)

    def forward(self, x):
        x = self.stem(x)
        for conv, merge in zip(self.convs, self.merges):
            x = torch.relu(merge(conv(x), x))
        return self.fc(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 6, 6, generator=generator).to(next(model.parameters()))
    y = torch.randint(0, 5, (4,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def alternating(model, **kwargs):
    return create_optimizer_v2(model, **{**dict(opt='alternating', base='sgd', lr=.1), **kwargs})


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def sides(model):
    merge = [p for k, p in model.named_parameters() if 'merges' in k]
    backbone = [p for k, p in model.named_parameters() if 'merges' not in k]
    return dict(backbone=backbone, merge=merge)


def all_require_grad(model):
    return all(p.requires_grad for p in model.parameters())


def steps(model, optimizer, start, stop, clip=None, closure=False):
    for step in range(start, stop):
        def backward(step=step):
            loss = loss_of(model, step)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        assert optimizer.step(backward) > 0 if closure else backward() > 0
        if not closure:
            optimizer.step()
        optimizer.zero_grad()


def train(model, optimizer, epochs, start=0, **kwargs):
    for epoch in range(start, epochs):
        optimizer.set_epoch(epoch)
        steps(model, optimizer, epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH, **kwargs)


def train_by_hand(model, make, epochs, phase_of, clip=None):
    """Alternation written out: an optimizer for each side, gradients of one side only."""
    params = sides(model)
    optimizers = {side: make(ps) for side, ps in params.items()}
    for epoch in range(epochs):
        side = phase_of(epoch)
        for step in range(STEPS_PER_EPOCH):
            grads = torch.autograd.grad(loss_of(model, epoch * STEPS_PER_EPOCH + step), params[side])
            if clip:
                norm = torch.sqrt(sum(g.square().sum() for g in grads))
                grads = [g * min(1., clip / (norm.item() + 1e-6)) for g in grads]
            for p, g in zip(params[side], grads):
                p.grad = g
            optimizers[side].step()
            for p in params[side]:
                p.grad = None


def assert_equal(model, other, exact=True):
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(
            p, q, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-12, msg=lambda m, name=name: f'{name}: {m}')


BASES = {
    'sgd': (dict(base='sgd', momentum=.9, weight_decay=1e-2, filter_bias_and_bn=False),
            lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, nesterov=True, weight_decay=1e-2)),
    'adamw': (dict(base='adamw', lr=.01, weight_decay=.1, betas=(.8, .9), eps=1e-6, filter_bias_and_bn=False),
              lambda p: torch.optim.AdamW(p, lr=.01, weight_decay=.1, betas=(.8, .9), eps=1e-6)),
    'lamb': (dict(base='lamb', lr=.01, weight_decay=.1, filter_bias_and_bn=False),
             lambda p: Lamb(p, lr=.01, weight_decay=.1)),
}


@pytest.mark.parametrize('clip, closure', [(None, False), (None, True), (.05, False)])
@pytest.mark.parametrize('base', BASES)
def test_equals_alternation_by_hand(base, clip, closure):
    kwargs, make = BASES[base]
    model, by_hand = net().double(), net().double()
    train(model, alternating(model, period=2, **kwargs), 9, clip=clip, closure=closure)
    train_by_hand(by_hand, make, 9, lambda epoch: ['backbone', 'merge'][epoch // 2 % 2], clip)
    assert_equal(model, by_hand, exact=clip is None)


@pytest.mark.parametrize('base', BASES)
def test_period_zero_is_the_base_itself(base):
    kwargs, make = BASES[base]
    model, joint = net(), net()
    optimizer = alternating(model, period=0, **kwargs)
    assert optimizer.phase == 'joint'
    train(model, optimizer, 3)
    steps(joint, make(joint.parameters()), 0, 3 * STEPS_PER_EPOCH)
    assert_equal(model, joint)


@pytest.mark.parametrize('base', sorted(set(list_optimizers()) - {'alternating'}))
@torch.compiler.set_stance('force_eager')  # Kron compiles its step, which takes minutes
def test_frozen_side_waits_unchanged_under_every_base(base):
    model = net()
    try:
        optimizer = alternating(model, base=base, period=1, lr=1e-2, weight_decay=.1)
    except (AssertionError, ImportError, RuntimeError) as error:
        assert 'CUDA' in str(error) or 'apex' in str(error) or 'bitsandbytes' in str(error), error
        pytest.skip(f'{base} cannot be made on this machine: {error}')

    def snapshot(side):  # without the clock
        groups = [g for g in optimizer.param_groups if g['side'] == side]
        params = sides(model)[side]
        state = [optimizer.state.get(p, {}) for p in params]
        settings = [{k: v for k, v in g.items() if k not in ('params', 'epoch')} for g in groups]
        return copy.deepcopy((params, state, settings))

    for epoch in range(4):
        idle, active = ('merge', 'backbone') if epoch % 2 == 0 else ('backbone', 'merge')
        before = snapshot(idle), snapshot(active)
        optimizer.set_epoch(epoch)
        for step in range(2):
            loss_of(model, step).backward(create_graph=getattr(optimizer, 'is_second_order', False))
            optimizer.step()
            optimizer.zero_grad()
        assert same(before[0], snapshot(idle)), f'{idle} moved in epoch {epoch}'
        assert not same(before[1][0], snapshot(active)[0]), f'{active} did not move in epoch {epoch}'


def test_no_gradient_is_computed_for_the_frozen_side():
    model = timm.create_model('awm_resnet14_cifar')
    optimizer = alternating(model, period=1)
    flops = []
    for epoch in range(2):
        optimizer.set_epoch(epoch)
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        flops.append(counter.get_total_flops())
        optimizer.zero_grad()
    # forward, input gradients and weight gradients cost the same each; the last are spared, the first two remain
    assert flops[1] / flops[0] < 0.67


def test_phases_change_no_output():
    model = create('awm_resnet14_cifar', away=True)
    optimizer, expected = alternating(model, period=1), model(images())
    for epoch in range(2):  # to the last bit: merges stay fused, which round otherwise than the plain formula
        optimizer.set_epoch(epoch)
        assert torch.equal(model(images()), expected)


def test_a_compiled_model_follows_the_phases():
    kwargs, make = BASES['sgd']
    model, by_hand = net().double(), net().double()
    train(torch.compile(model, backend='aot_eager'), alternating(model, period=1, **kwargs), 4)
    train_by_hand(by_hand, make, 4, lambda epoch: ['backbone', 'merge'][epoch % 2])
    assert_equal(model, by_hand, exact=False)
    torch._dynamo.reset()


def test_a_deleted_optimizer_leaves_nothing_frozen():
    model = net()
    optimizer = alternating(model, period=1)
    train(model, optimizer, 3)
    assert not any(p.requires_grad for p in sides(model)['merge'])
    del optimizer
    gc.collect()
    assert all_require_grad(model)


def set_flag(module, flag):
    for p in module.parameters():
        p.requires_grad = flag


@pytest.mark.parametrize('set_by_user', [nn.Module.requires_grad_, set_flag])
@pytest.mark.parametrize('when', [None, 0, 1])  # before, in a backbone phase, in a merge phase
def test_what_the_user_froze_stays_frozen(when, set_by_user):
    model = net()
    if when is None:
        set_by_user(model.stem, False)
    optimizer = Alternating(model.parameters(), period=1, lr=.1)
    for epoch in range(5):
        train(model, optimizer, epoch + 1, start=epoch)
        if epoch == when:
            set_by_user(model.stem, False)
        if epoch == (when or 0):
            before = copy.deepcopy(model)
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert_equal(model.stem, before.stem)
    assert not any(torch.equal(p, q) for p, q in zip(model.convs.parameters(), before.convs.parameters()))
    optimizer.unfreeze()
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.convs.parameters())
    set_by_user(model.stem, True)
    train(model, optimizer, 6, start=5)
    assert_equal(model.stem, before.stem)  # idle again
    train(model, optimizer, 7, start=6)
    assert not torch.equal(model.stem.weight, before.stem.weight)


def test_nobody_can_train_the_idle_side():
    model = net()
    optimizer = alternating(model, period=1, lr=1.)
    before = copy.deepcopy(model)
    optimizer.set_epoch(1)
    model.requires_grad_(True)  # by the user
    loss_of(model, 0).backward()
    optimizer.step()
    for side, params in sides(model).items():
        assert all((p.grad is None) == torch.equal(p, q) == (side == 'backbone')
                   for p, q in zip(params, sides(before)[side]))


@pytest.mark.parametrize('make_copy', [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.optim.swa_utils.AveragedModel(m).module])
@pytest.mark.parametrize('epoch', [0, 1])
def test_a_copy_of_the_model_taken_in_a_phase_can_be_trained(epoch, make_copy):
    model, by_hand = net().double(), net().double()
    model.fc.requires_grad_(False)
    alternating(model, period=1).set_epoch(epoch)
    optimizer = alternating(model, period=1)
    optimizer.set_epoch(epoch)
    other = make_copy(model)
    assert [p.requires_grad for p in other.parameters()] == ['fc' not in k for k, _ in other.named_parameters()]
    other.requires_grad_(True)
    train(other, alternating(other, period=1, **BASES['sgd'][0]), 4)
    train_by_hand(by_hand, BASES['sgd'][1], 4, lambda epoch: ['backbone', 'merge'][epoch % 2])
    assert_equal(other, by_hand)


def test_a_second_optimizer_over_the_same_parameters():
    model, other = net(), net()
    first, apart = alternating(model, period=1), alternating(other, period=1)
    optim.set_epoch(1)
    with pytest.raises(ValueError, match='Unknown base'):
        alternating(model, base='sdg')
    with pytest.raises(ValueError, match='thawed now: make the optimizer again'):
        alternating(model, period=0)  # timm's factory leaves out what is frozen
    assert all_require_grad(model)
    optim.set_epoch(1)
    second = Alternating(model.parameters(), period=2, lr=.1)
    assert all_require_grad(model) and not all_require_grad(other)
    optim.set_epoch(3)
    assert (first.epoch, apart.epoch, second.epoch) == (1, 3, 3)
    del first
    gc.collect()
    assert [p.requires_grad for p in sides(model)['backbone']] == [False] * len(sides(model)['backbone'])


def test_copies_of_the_optimizer_go_on_alike():
    model = net()
    optimizer = alternating(model, period=2)
    train(model, optimizer, 3)
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # which puts a `step` bound to this optimizer into it
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 7, start=3)
    for copied in copies:
        train(*copied, 7, start=3)
        assert_equal(model, copied[0])


STEP_IN_A_FRESH_PROCESS = '''
import sys
import torch, timm_awm
model, optimizer = torch.load('before', weights_only=False)
optimizer.set_epoch(3)
model(torch.ones(2, 3, 32, 32)).sum().backward()
optimizer.step()
torch.save(model.state_dict(), 'after')
'''


def test_unpickled_in_a_fresh_process(tmp_path):
    model = create('awm_resnet14_cifar', away=True)
    optimizer = alternating(model, base='adamw', period=2)
    optimizer.set_epoch(2)
    torch.save((model, optimizer), tmp_path / 'before')
    subprocess.run([sys.executable, '-c', STEP_IN_A_FRESH_PROCESS], cwd=tmp_path, check=True)
    optimizer.set_epoch(3)
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert same(model.state_dict(), torch.load(tmp_path / 'after'))


@pytest.mark.parametrize('base', ['sgd', 'adamw'])
def test_clones_as_libraries_make_them(base):
    model = net()
    optimizer = alternating(model, base=base, period=1, merge_period=2)
    train(model, optimizer, 1)
    for make in (
            lambda params: Alternating(optimizer.param_groups),
            lambda params: type(optimizer)(params, base=base, **{
                key: optimizer.defaults[key] for key in ('lr', 'period', 'merge_period')})):
        other = copy.deepcopy(model)
        groups = optimizer.param_groups
        clone = make(other.parameters())
        assert type(clone.base) is type(optimizer.base)
        assert ''.join(clone.schedule.phase(epoch)[0] for epoch in range(6)) == 'bmmbmm'
        assert [g['side'] for g in clone.param_groups] == [g['side'] for g in groups]


def test_hooks_and_schedulers():
    model, log = net(), []
    optimizer = alternating(model, period=1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, .5)
    optimizer.register_step_post_hook(lambda o, *_: scheduler.step())  # sees, and changes, all groups
    optimizer.register_step_pre_hook(lambda o, *_: log.append(len(o.param_groups)))
    for kind in 'state_dict_pre', 'state_dict_post', 'load_state_dict_pre', 'load_state_dict_post':
        getattr(optimizer, f'register_{kind}_hook')(lambda *_, kind=kind: log.append(kind))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    groups = [len(optimizer.param_groups)] * STEPS_PER_EPOCH
    assert log == [*groups, 'state_dict_pre', 'state_dict_post', 'load_state_dict_pre', 'load_state_dict_post']
    assert {group['lr'] for group in optimizer.param_groups} == {.1 * .5 ** STEPS_PER_EPOCH}
    plateau, _ = create_scheduler_v2(optimizer, sched='plateau', patience_epochs=0, decay_rate=.5, num_epochs=9)
    for epoch in range(3):
        plateau.step(epoch, 1.)
    assert optimizer.param_groups[0]['lr'] == optimizer.param_groups[-1]['lr'] < .1 * .5 ** STEPS_PER_EPOCH


def test_groups_have_no_arguments_of_the_optimizer():
    optimizer = alternating(net())
    for make in lambda group: Alternating([group]), optimizer.add_param_group:
        with pytest.raises(ValueError, match='no period of its own.*ZeroRedundancyOptimizer'):
            make(dict(params=list(nn.Linear(2, 2).parameters()), period=1))


@pytest.mark.parametrize('epoch', [-1, 1.5, '3', torch.tensor(1), None, True])
def test_impossible_epochs_are_refused(epoch):
    optimizer = alternating(net(), period=1)
    with pytest.raises(ValueError, match='epoch must be a whole number'):
        optimizer.set_epoch(epoch)
    assert optimizer.epoch is None


@pytest.mark.parametrize('base', ['sgd', 'adamw', 'lamb'])
@pytest.mark.parametrize('epoch, step', [(3, 0), (3, 2), (4, 0), (5, 1)])  # phases change at 2, 4, 6
def test_resumed_run_equals_the_uninterrupted_one(base, epoch, step, tmp_path):
    def run(model, optimizer, start, stop):
        for i in range(start, stop):
            if i % STEPS_PER_EPOCH == 0:
                optimizer.set_epoch(np.int64(i // STEPS_PER_EPOCH))  # which weights_only would not load
            steps(model, optimizer, i, i + 1)

    model, resumed = net(), net()
    optimizer, other = (alternating(m, period=2, **BASES[base][0]) for m in (model, resumed))
    done = epoch * STEPS_PER_EPOCH + step
    run(model, optimizer, 0, done)
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / 'checkpoint')
    checkpoint = torch.load(tmp_path / 'checkpoint', weights_only=True)
    other.set_epoch(0)
    resumed.load_state_dict(checkpoint['model'])
    other.load_state_dict(checkpoint['optimizer'])
    assert all_require_grad(resumed)  # DDP ignores for good what is frozen when it wraps the model
    assert (other.epoch, other.phase) == (optimizer.epoch, optimizer.phase)
    for args in (model, optimizer), (resumed, other):
        run(*args, done, 8 * STEPS_PER_EPOCH)
    assert_equal(model, resumed)


def test_added_groups_alternate_too():
    model, head, late = net(), nn.Linear(5, 5), nn.Linear(5, 5)
    optimizer = alternating(model, base='momentum', period=1, momentum=0.)
    optimizer.add_param_group(dict(params=list(head.parameters()), lr=.5))
    before = copy.deepcopy(head)
    optimizer.set_epoch(0)
    head(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(before.weight - .5, head.weight)
    optimizer.set_epoch(1)
    optimizer.add_param_group(dict(params=list(late.parameters())))
    assert not any(p.requires_grad for p in (*head.parameters(), *late.parameters()))


@pytest.mark.parametrize('base', ['sgd', 'adamw'])
def test_distributed_checkpoint(base, tmp_path):
    def make():
        model = net()
        return model, alternating(model, base=base, weight_decay=.1, period=1)

    model, optimizer = make()
    train(model, optimizer, 2)
    state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer)))
    dcp.save(state, checkpoint_id=tmp_path)
    other, other_optimizer = make()
    state = dict(zip(('model', 'optimizer'), get_state_dict(other, other_optimizer)))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(other, other_optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
    assert (other_optimizer.epoch, other_optimizer.phase) == (1, 'merge')
    for args in ((model, optimizer), (other, other_optimizer)):
        train(*args, 4, start=2)
    assert_equal(model, other)


@pytest.mark.parametrize('period, merge_period, phases', [
    (1, None, 'bmbmbmbm'), (3, None, 'bbbmmmbb'), (3, 1, 'bbbmbbbm'), (1, 2, 'bmmbmmbm'), (0, None, 'jjjjjjjj')])
def test_schedule(period, merge_period, phases):
    schedule = PhaseSchedule(period, merge_period)
    assert ''.join(schedule.phase(epoch)[0] for epoch in range(8)) == phases
    assert alternating(net(), period=period, merge_period=merge_period).schedule == schedule
    assert alternating(net()).schedule == PhaseSchedule(3)


@pytest.mark.parametrize('kwargs, message', [
    (dict(period=-1), 'period must be a whole number.*at least 0, got -1'),
    (dict(period='three'), "period must be a whole number.*got 'three'"),
    (dict(merge_period=0), 'merge_period must be a whole number.*at least 1, got 0'),
    (dict(period=0, merge_period=1), 'merge_period makes no sense with period=0'),
    (dict(base='sdg'), "Unknown base optimizer 'sdg'.*list_optimizers"),
    (dict(base='awm_sgd'), "Unknown base optimizer 'awm_sgd'"),
    (dict(base='lookahead_adam'), '--opt lookahead_alternating'),
    (dict(base='alternating'), "Unknown base optimizer 'alternating'"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        alternating(net(), **kwargs)


@pytest.mark.parametrize('side', ['merge', 'backbone'])
def test_nothing_to_train(side):
    other, model = net(), net()  # merges of another model do not count
    for p in sides(model)[side]:
        p.requires_grad = False
    for m in (model, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f'found no ({side}|merge) parameters.*awm=False.*--opt sgd'):
            alternating(m)
    optim.set_epoch(3)
    assert all_require_grad(other)


@pytest.mark.parametrize('kwargs', [{}, dict(base='adafactor', lr=None), dict(base='adamw', lr=0.)])
def test_step_without_an_epoch(kwargs):
    model = net()
    optimizer = alternating(model, **kwargs)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r'calls optimizer.set_epoch\(epoch\)'):
        for _ in range(2):  # the first at lr = 0 may be that of torch.distributed.checkpoint
            optimizer.step()


@pytest.mark.parametrize('make', [
    lambda model: torch.optim.SGD(model.parameters(), lr=.1),
    lambda model: alternating(model, period=1),
    lambda model: alternating(model, base='adamw'),
    lambda model: Alternating([dict(params=[p]) for p in model.parameters()], lr=.1),
])
def test_state_of_another_optimizer(make):
    with pytest.raises(ValueError, match='--opt-kwargs that the run was started with, or with --no-resume-opt'):
        alternating(net()).load_state_dict(make(net()).state_dict())
