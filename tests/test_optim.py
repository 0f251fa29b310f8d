import copy
import gc
import logging
import pickle
from collections import defaultdict

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from networks import create
from recorder import same
from timm.optim import Lamb, create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.flop_counter import FlopCounterMode

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
    return create_optimizer_v2(model, opt='alternating', **kwargs)


def sides(model):
    merge = [p for k, p in model.named_parameters() if 'merges' in k]
    backbone = [p for k, p in model.named_parameters() if 'merges' not in k]
    return dict(backbone=backbone, merge=merge)


def steps(model, optimizer, start, stop, clip=None):
    for step in range(start, stop):
        loss_of(model, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def train(model, optimizer, epochs, clip=None, start=0):
    for epoch in range(start, epochs):
        optimizer.set_epoch(epoch)
        steps(model, optimizer, epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH, clip)


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
    'sgd': (dict(base='sgd', lr=.1, momentum=.9, weight_decay=1e-2),
            lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, nesterov=True, weight_decay=1e-2)),
    'adamw': (dict(base='adamw', lr=.01, weight_decay=.1, betas=(.8, .9), eps=1e-6),
              lambda p: torch.optim.AdamW(p, lr=.01, weight_decay=.1, betas=(.8, .9), eps=1e-6)),
    'lamb': (dict(base='lamb', lr=.01, weight_decay=.1), lambda p: Lamb(p, lr=.01, weight_decay=.1)),
}


@pytest.mark.parametrize('clip', [None, .05])
@pytest.mark.parametrize('base', BASES)
def test_equals_alternation_by_hand(base, clip):
    kwargs, make = BASES[base]
    model, by_hand = net().double(), net().double()
    train(model, alternating(model, period=2, filter_bias_and_bn=False, **kwargs), 9, clip)
    train_by_hand(by_hand, make, 9, lambda epoch: ['backbone', 'merge'][epoch // 2 % 2], clip)
    assert_equal(model, by_hand, exact=clip is None)


def test_rate_and_decay_of_the_merges_alone():
    model, by_hand = net(), net()
    kwargs = dict(base='sgd', lr=.1, momentum=.9, weight_decay=1e-2, filter_bias_and_bn=False)
    # as YAML has numbers like 3e-1
    train(model, alternating(model, period=2, merge_lr_scale='25e-2', merge_weight_decay='3e-1', **kwargs), 9)

    def make(params):
        if any(params[0] is p for p in sides(by_hand)['merge']):
            return torch.optim.SGD(params, lr=.025, momentum=.9, nesterov=True, weight_decay=.3)
        return torch.optim.SGD(params, lr=.1, momentum=.9, nesterov=True, weight_decay=1e-2)

    train_by_hand(by_hand, make, 9, lambda epoch: ['backbone', 'merge'][epoch // 2 % 2])
    assert_equal(model, by_hand)


@pytest.mark.parametrize('schedule', [
    lambda o: create_scheduler_v2(o, sched='cosine', num_epochs=8, warmup_epochs=2, warmup_lr=.04, min_lr=.05)[0],
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, eta_min=.05),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, .2, total_steps=9, cycle_momentum=False),
])
def test_the_rate_of_the_merges_keeps_its_share(schedule):
    model, plain, late = net(), torch.optim.SGD(net().parameters(), lr=.1), SumMerge(4)
    optimizer = alternating(model, base='momentum', momentum=0., lr=.1, period=0, merge_lr_scale=.25)
    optimizer.add_param_group(dict(params=list(late.parameters()), lr=.1))
    parts = {'merge': [*sides(model)['merge'], *late.parameters()], 'backbone': sides(model)['backbone']}
    schedulers = schedule(plain), schedule(optimizer)
    for epoch in range(8):
        before = copy.deepcopy(parts)
        for p in (*parts['merge'], *parts['backbone']):
            p.grad = torch.ones_like(p)
        plain.step()
        optimizer.step()
        for side, scale in ('backbone', 1), ('merge', .25):
            for p, q in zip(parts[side], before[side]):
                torch.testing.assert_close(q - p, torch.full_like(p, scale * plain.param_groups[0]['lr']))
        for scheduler in schedulers:
            scheduler.step(epoch + 1) if hasattr(scheduler, 'step_update') else scheduler.step()


@pytest.mark.parametrize('base', BASES)
def test_period_zero_is_the_base_itself(base):
    kwargs, make = BASES[base]
    model, joint = net(), net()
    optimizer = alternating(model, period=0, filter_bias_and_bn=False, **kwargs)
    assert optimizer.phase == 'joint'
    train(model, optimizer, 3)
    plain = make(joint.parameters())
    steps(joint, plain, 0, 3 * STEPS_PER_EPOCH)
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
    optimizer = alternating(model, base='sgd', period=1, lr=.1)
    flops = {}
    for epoch in range(2):
        optimizer.set_epoch(epoch)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        flops[optimizer.phase] = counter.get_total_flops()
        trained = {k for k, p in model.named_parameters() if p.grad is not None}
        assert trained == {k for k, _ in model.named_parameters() if ('.merge.' in k) == (optimizer.phase == 'merge')}
        optimizer.zero_grad()
    # forward, input gradients and weight gradients cost the same each; the last are spared, the first two remain
    assert flops['merge'] / flops['backbone'] < 0.67


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_a_compiled_model_follows_the_phases(backend):
    kwargs, make = BASES['sgd']
    model, by_hand = net().double(), net().double()
    train(torch.compile(model, backend=backend), alternating(model, period=1, filter_bias_and_bn=False, **kwargs), 4)
    train_by_hand(by_hand, make, 4, lambda epoch: ['backbone', 'merge'][epoch % 2])
    assert_equal(model, by_hand, exact=False)
    torch._dynamo.reset()


def test_merges_of_other_models_are_left_alone():
    other, optimizer = SumMerge(4).mix, alternating(net(), base='sgd', period=1, lr=.1)
    parameters = other._parameters  # another thread may be reading them
    optimizer.set_epoch(0)
    assert other._parameters is parameters


def all_require_grad(model):
    return all(p.requires_grad for p in model.parameters())


def test_unfreeze():
    model = net()
    optimizer = alternating(model, base='sgd', period=1, lr=.1)
    train(model, optimizer, 2)
    optimizer.unfreeze()
    assert all_require_grad(model)
    optimizer.set_epoch(2)
    assert not any(p.requires_grad for p in sides(model)['merge'])
    del optimizer
    gc.collect()
    assert all_require_grad(model)


def test_what_the_user_froze_stays_frozen():
    model = net()
    model.stem.requires_grad_(False)
    before = copy.deepcopy(model)
    train(model, alternating(model, base='sgd', period=1, lr=.1), 3)
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert_equal(model.stem, before.stem)
    for p in sides(model)['backbone']:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match='found no backbone that requires gradients.*train=merge'):
        alternating(model, base='sgd', period=1, lr=.1)
    before = copy.deepcopy(model)
    train(model, alternating(model, base='sgd', period=0, lr=.1), 1)
    for side, params in sides(model).items():
        assert all(torch.equal(p, q) == (side == 'backbone') for p, q in zip(params, sides(before)[side]))


TRAIN = ['merge', 'merge+head']


def awm_net(name='awm_resnet14_cifar', **kwargs):
    return create(name, away=True, **kwargs)


def trained_names(model, train):
    """Which parameters `train` means, by their names in the two 32x32 families."""
    heads = ('fc.', 'classifier.') if train == 'merge+head' else ()
    return {k for k, _ in model.named_parameters() if '.merge.' in k or k.startswith(heads)}


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
@pytest.mark.parametrize('train', TRAIN)
@pytest.mark.parametrize('base', ['sgd', 'adamw'])
def test_train_equals_a_plain_optimizer_over_these_parameters_alone(base, train, name):
    kwargs, make = BASES[base]
    model, by_hand, start = awm_net(name), awm_net(name), awm_net(name)
    optimizer = alternating(model, train=train, filter_bias_and_bn=False, **kwargs)
    names = trained_names(model, train)
    for key, p in by_hand.named_parameters():
        p.requires_grad_(key in names)
    steps(model, optimizer, 0, 2)  # nobody need set an epoch
    optimizer.set_epoch(7)
    steps(model, optimizer, 2, 4)
    steps(by_hand, make([p for p in by_hand.parameters() if p.requires_grad]), 0, 4)
    assert_equal(model, by_hand)
    changed = {key for (key, p), q in zip(model.named_parameters(), start.parameters()) if not torch.equal(p, q)}
    assert changed == names
    loss_of(model, 0).backward()
    assert {k for k, p in model.named_parameters() if p.grad is not None} == names
    assert len(optimizer.state_dict()['state']) == len(names)
    optimizer.unfreeze()
    assert all_require_grad(model)


@pytest.mark.parametrize('train', TRAIN)
def test_train_resumes(train):
    def make():
        model = awm_net()
        return model, alternating(model, base='adamw', train=train, lr=.01)

    model, optimizer = make()
    steps(model, optimizer, 0, 3)
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for args in ((model, optimizer), (resumed, resumed_optimizer)):
        steps(*args, 3, 5)
    assert_equal(resumed, model)


def test_the_head_is_that_of_the_model_as_it_is_now():
    model, other = awm_net(), awm_net()
    model.reset_classifier(3)
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = Alternating(m.named_parameters(), base='sgd', train='merge+head', lr=.1)
        heads = [p for group in optimizer.param_groups if group['side'] == 'head' for p in group['params']]
        assert list(map(id, heads)) == list(map(id, m.fc.parameters()))
    assert all_require_grad(other)


@pytest.mark.parametrize('kwargs', [dict(period=2), dict(train='merge')])
def test_copies_go_on_alike(kwargs):
    model = net()
    optimizer = alternating(model, base='sgd', lr=.1, momentum=.9, **kwargs)
    train(model, optimizer, 3)
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # which puts a `step` bound to this optimizer into it
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for args in ((model, optimizer), *copies):
        train(*args, 7, start=3)
    for other, _ in copies:
        assert_equal(model, other)


def test_it_is_the_base():
    model, log = net(), []
    optimizer = alternating(model, period=1, merge_lr_scale=.5, **BASES['sgd'][0])
    assert isinstance(optimizer, torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, .5)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())  # sees, and changes, all groups
    optimizer.register_step_pre_hook(lambda *_: log.append('step'))
    optimizer.register_step_post_hook(lambda *_: log.append('stepped'))
    optimizer.register_state_dict_pre_hook(lambda o: log.append(o))
    optimizer.register_load_state_dict_post_hook(lambda o: log.append(o))
    for _ in range(2):
        log.clear()
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        assert log == ['step', 'stepped'] * STEPS_PER_EPOCH + [optimizer, optimizer]
    assert {group['lr'] for group in optimizer.param_groups} == {.1 * .5 ** (2 * STEPS_PER_EPOCH)}


def test_the_rate_that_a_base_finds_by_itself_is_kept():
    model = net()
    optimizer = alternating(model, base='adafactor', lr=None, period=0)
    steps(model, optimizer, 0, 2)
    assert all(group['lr'] > 0 for group in optimizer.param_groups)


class Counting(Alternating):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def test_subclasses_keep_what_they_override():
    model = net()
    optimizer = Counting(model.parameters(), base='sgd', period=1, lr=.1)
    for o in (optimizer, copy.deepcopy((model, optimizer))[1]):
        assert isinstance(o, Counting) and isinstance(o, torch.optim.SGD)
        o.set_epoch(0)
        o.step()
    assert optimizer.steps == 1


def test_the_state_can_be_reset():
    model, by_hand = net(), net()
    optimizer = alternating(model, period=2, filter_bias_and_bn=False, **BASES['sgd'][0])
    plain = BASES['sgd'][1](sides(by_hand)['backbone'])
    for o, m in (optimizer, model), (plain, by_hand):
        if o is optimizer:
            o.set_epoch(0)
        steps(m, o, 0, 2)
        o.state = defaultdict(dict)
        steps(m, o, 2, 4)
    assert_equal(model, by_hand)


@pytest.mark.parametrize('base, key, nearest', [
    ('sgd', 'perod', 'period'), ('sgd', 'nesterof', 'nesterov'), ('adamw', 'betta', 'betas'),
    ('lamb', 'merge_lr_scal', 'merge_lr_scale')])
def test_misspelt_arguments(base, key, nearest):
    with pytest.raises(TypeError, match=f"its base {base} takes '{key}'; the nearest is '{nearest}'"):
        alternating(net(), base=base, lr=.1, **{key: 3})


def test_groups_have_no_arguments_of_the_optimizer():
    optimizer = alternating(net(), base='sgd', lr=.1)
    for make in Alternating, optimizer.add_param_group:
        groups = dict(params=list(nn.Linear(2, 2).parameters()), merge_lr_scale=.1)
        with pytest.raises(ValueError, match='no merge_lr_scale of its own.*ZeroRedundancyOptimizer'):
            make(groups if make == optimizer.add_param_group else [groups])


@pytest.mark.parametrize('epoch', [-1, 1.5, '3', torch.tensor(1), None, True])
def test_impossible_epochs_are_refused(epoch):
    optimizer = alternating(net(), base='sgd', period=1, lr=.1)
    with pytest.raises(ValueError, match='epoch must be a whole number'):
        optimizer.set_epoch(epoch)
    assert optimizer.epoch is None


def test_steps_that_a_scaler_skips():
    model = net()
    optimizer = alternating(model, base='sgd', period=1, lr=.1, momentum=.9)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    for epoch in range(2):
        optimizer.set_epoch(epoch)
        for factor in (float('inf'), 1.):
            before = copy.deepcopy(model)
            scaler.scale(loss_of(model, epoch) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            for side, params in sides(model).items():
                still = all(torch.equal(p, q) for p, q in zip(params, sides(before)[side]))
                assert still == (factor != 1. or side != optimizer.phase)


@pytest.mark.parametrize('base', ['sgd', 'adamw', 'lamb'])
@pytest.mark.parametrize('epoch, step', [(3, 0), (3, 2), (4, 0), (5, 1)])  # phases change at 2, 4, 6
def test_resumed_run_equals_the_uninterrupted_one(base, epoch, step, tmp_path):
    def run(model, optimizer, scheduler, start, stop):
        for i in range(start, stop):
            if i % STEPS_PER_EPOCH == 0:
                optimizer.set_epoch(i // STEPS_PER_EPOCH)
            steps(model, optimizer, i, i + 1)
            if (i + 1) % STEPS_PER_EPOCH == 0:
                scheduler.step((i + 1) // STEPS_PER_EPOCH)

    def make():
        model = net()
        optimizer = alternating(model, period=2, filter_bias_and_bn=False, **BASES[base][0])
        return model, optimizer, create_scheduler_v2(optimizer, sched='cosine', num_epochs=8)[0]

    model, optimizer, scheduler = make()
    done = epoch * STEPS_PER_EPOCH + step
    run(model, optimizer, scheduler, 0, done)
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / 'checkpoint')
    resumed, resumed_optimizer, resumed_scheduler = make()
    checkpoint = torch.load(tmp_path / 'checkpoint', weights_only=True)
    resumed.load_state_dict(checkpoint['model'])
    resumed_optimizer.load_state_dict(checkpoint['optimizer'])
    resumed_scheduler.step(epoch)
    assert resumed_optimizer.epoch == optimizer.epoch
    assert resumed_optimizer.phase == optimizer.phase
    for args in ((model, optimizer, scheduler), (resumed, resumed_optimizer, resumed_scheduler)):
        run(*args, done, 8 * STEPS_PER_EPOCH)
    assert_equal(model, resumed)


def test_added_groups_take_turns_too():
    model, head, late = net(), nn.Linear(5, 5), nn.Linear(5, 5)
    optimizer = alternating(model, base='momentum', period=1, lr=.1, momentum=0.)
    optimizer.add_param_group(dict(params=list(head.parameters()), lr=.5))
    before = copy.deepcopy(head)
    optimizer.set_epoch(0)
    head(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(before.weight - .5, head.weight)
    optimizer.set_epoch(1)
    optimizer.add_param_group(dict(params=list(late.parameters())))
    assert not any(p.requires_grad for p in (*head.parameters(), *late.parameters()))


def test_closure():
    model, by_hand = net(), net()
    optimizer = alternating(model, period=1, filter_bias_and_bn=False, **BASES['sgd'][0])
    for epoch in range(4):
        optimizer.set_epoch(epoch)
        for step in range(STEPS_PER_EPOCH):
            def closure(index=epoch * STEPS_PER_EPOCH + step):
                optimizer.zero_grad()
                loss = loss_of(model, index)
                loss.backward()
                return loss
            assert optimizer.step(closure).item() > 0
    train_by_hand(by_hand, BASES['sgd'][1], 4, lambda epoch: ['backbone', 'merge'][epoch % 2])
    assert_equal(model, by_hand)


@pytest.mark.parametrize('base, kwargs', [
    ('sgd', dict(period=1)), ('adamw', dict(period=1)), ('adamw', dict(train='merge'))])
def test_distributed_checkpoint(base, kwargs, tmp_path):
    def make():
        model = net()
        return model, alternating(model, base=base, lr=.1, weight_decay=.1, **kwargs)

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


def test_lookahead_does_not_move_the_frozen_side():
    model = net()
    optimizer = create_optimizer_v2(model, opt='lookahead_alternating', base='sgd', period=1, lr=.1)
    for epoch in range(4):
        optimizer._base_optimizer.set_epoch(epoch)
        idle = copy.deepcopy(sides(model)[['merge', 'backbone'][epoch % 2]])
        for step in range(7):  # lookahead acts at every sixth
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(p, q) for p, q in zip(idle, sides(model)[['merge', 'backbone'][epoch % 2]]))


def test_phase_is_logged(caplog):
    model = net()
    optimizer = alternating(model, base='sgd', period=1, lr=.1)
    with caplog.at_level(logging.INFO):
        optimizer.set_epoch(0)
        optimizer.set_epoch(1)
    trained = {side: sum(p.numel() for p in params) for side, params in sides(model).items()}
    assert f'Epoch 0: backbone phase, trains {trained["backbone"]:,}' in caplog.text
    assert f'Epoch 1: merge phase, trains {trained["merge"]:,}' in caplog.text


@pytest.mark.parametrize('period, merge_period, phases', [
    (1, None, 'bmbmbmbm'), (3, None, 'bbbmmmbb'), (3, 1, 'bbbmbbbm'), (1, 2, 'bmmbmmbm'), (0, None, 'jjjjjjjj')])
def test_schedule(period, merge_period, phases):
    schedule = PhaseSchedule(period, merge_period)
    assert ''.join(schedule.phase(epoch)[0] for epoch in range(8)) == phases


@pytest.mark.parametrize('kwargs, message', [
    (dict(period=-1), 'period must be a whole number.*at least 0, got -1'),
    (dict(period='three'), "period must be a whole number.*got 'three'"),
    (dict(merge_period=0), 'merge_period must be a whole number.*at least 1, got 0'),
    (dict(period=0, merge_period=1), 'merge_period makes no sense with period=0'),
    (dict(train='head'), "train must be 'merge' or 'merge.head', or not given, got 'head'"),
    (dict(train='merge', period=3), 'train=merge does not alternate: give it without period'),
    (dict(merge_lr_scale=0), 'merge_lr_scale must be above 0, got 0'),
    (dict(base='adafactor', lr=None, merge_lr_scale=.1), 'merge_lr_scale needs a learning rate'),
    (dict(merge_weight_decay=-.1), 'merge_weight_decay must be at least 0, got -0.1'),
    (dict(base='sdg'), "Unknown base optimizer 'sdg', the nearest is 'sgd'"),
    (dict(base='awm_sgd'), "Unknown base optimizer 'awm_sgd', the nearest is 'sgd'"),
    (dict(base='lookahead_adam'), '--opt lookahead_alternating'),
    (dict(base='alternating'), "Unknown base optimizer 'alternating'"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        alternating(net(), **{**dict(base='sgd', lr=.1), **kwargs})


def test_period_is_3_if_not_given():
    assert alternating(net(), base='sgd', lr=.1, merge_period=1).schedule == PhaseSchedule(3, 1)


@pytest.mark.parametrize('make, kwargs, message', [
    (lambda: nn.Linear(2, 2), {}, 'no AWM merge.*awm=False.*--opt sgd'),
    (lambda: timm.create_model('awm_resnet14_cifar', awm=False), {}, 'no AWM merge'),
    (lambda: awm_net(num_classes=0), dict(train='merge+head'), 'no classifier to train.*num_classes above 0'),
    (net, dict(train='merge+head'), 'no classifier to train.*needs an AWM model'),
])
def test_nothing_to_train(make, kwargs, message):
    awm_net()  # merges and a classifier of another model do not count
    with pytest.raises(ValueError, match=message):
        alternating(make(), base='sgd', lr=.1, **kwargs)


def test_step_without_an_epoch():
    model = net()
    optimizer = alternating(model, base='sgd', period=3, lr=.1)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r'call.* optimizer.set_epoch\(epoch\)'):
        optimizer.step()


@pytest.mark.parametrize('make', [
    lambda model: torch.optim.SGD(model.parameters(), lr=.1),
    lambda model: alternating(model, base='sgd', train='merge+head', lr=.1),
])
def test_state_of_another_optimizer(make):
    state = make(awm_net()).state_dict()
    for kwargs in (dict(train='merge'), dict(period=1)):
        with pytest.raises(ValueError, match='--no-resume-opt'):
            alternating(awm_net(), base='sgd', lr=.1, **kwargs).load_state_dict(state)
