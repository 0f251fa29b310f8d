import copy
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BlurPool2d
from timm.utils import freeze
from torch import Tensor

import timm_awm
from timm_awm.layers import (
    ConcatMerge,
    MixingWeights,
    SumMerge,
    cpu_kernels,
    fused_concat,
    fused_merge,
    map_moments,
    passes,
    record_mixing_weights,
    set_fused_merge,
)

NHWC, NCHW = torch.channels_last, torch.contiguous_format
SMALL = ['awm_resnet14_cifar', 'awm_resnet18', 'awm_resnet26d', 'awm_densenet22_cifar']


def create(name, w2_std=1., **kwargs):
    """A model whose merges are away from the identity; without dead ends for gradients."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for m in model.modules():
        if isinstance(m, MixingWeights):
            nn.init.normal_(m.weight2, std=w2_std)
        elif isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.normal_(m.weight, 1, 0.2)
            nn.init.normal_(m.bias, 0, 0.2)
    return model


def images(batch=3, size=48, dtype=torch.float64, layout=NHWC):
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size).to(dtype).contiguous(memory_format=layout)


@pytest.fixture(autouse=True)
def switched_on():
    set_fused_merge(True)


@pytest.fixture
def calls(monkeypatch):
    """The passes that the code under test makes."""
    names = []

    def spy(name):
        function = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *args: names.append(name) or function(*args))

    for name in passes.__all__:
        if name != 'available':
            spy(name)
    return names


def both(model, run):
    """run of a copy of the model by the plain formula, and of another fused."""
    results = []
    for fused in (False, True):
        set_fused_merge(fused)
        results.append(run(copy.deepcopy(model)))
    return results


def train_step(x, autocast=None):
    def run(model):
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            out = model(x)
        out.double().square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return dict(out=out, **grads, **dict(model.named_buffers()))
    return run


def difference(expected, actual):
    """The largest relative difference of norms, of what both name."""
    assert expected.keys() == actual.keys()
    return max(
        ((actual[k].double() - v.double()).norm() / v.double().norm().clamp(min=1e-12)).item()
        for k, v in expected.items())


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('side', ['both', 'backbone', 'merge'])
@pytest.mark.parametrize('name', SMALL)
def test_training_step_is_that_of_the_plain_formula(name, side, layout, calls):
    model = create(name).double().to(memory_format=layout)
    if side != 'both':
        for n, p in model.named_parameters():
            p.requires_grad_(('.merge.' in n) == (side == 'merge'))
    plain, fused = both(model, train_step(images(layout=layout)))
    assert difference(plain, fused) < 1e-9
    assert fused['out'].requires_grad and 'affine_act_backward' in calls
    if 'resnet' in name:  # all merges, and the weights are read once each
        merges = sum(isinstance(m, SumMerge) for m in model.modules())
        assert calls.count('affine_act') == calls.count('affine_act_backward') == merges


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('name', SMALL)
def test_inference_is_that_of_the_plain_formula(name, layout, calls):
    model = create(name).double().to(memory_format=layout).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    x = images(layout=layout)
    kept = x.clone()
    with torch.no_grad():
        plain, fused = both(model, lambda m: dict(out=m(x)))
    assert difference(plain, fused) < 1e-12
    assert 'affine_act_' in calls and torch.equal(x, kept)


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_lower_precision_differs_by_its_rounding(name, dtype, bound, calls):
    """Both ways are as far from float64, within a factor."""
    model = create(name)
    x = images(batch=16, size=32, dtype=torch.float32)
    set_fused_merge(False)
    exact = train_step(x.double())(copy.deepcopy(model).double())
    plain, fused = both(model, train_step(x, autocast=dtype if dtype == torch.bfloat16 else None))
    assert calls and difference(exact, fused) < max(bound, 3 * difference(exact, plain))
    assert (fused['out'].double() - exact['out']).norm() / exact['out'].norm() < bound


@pytest.mark.parametrize('w2_std', [30., 3000.])
def test_weights_near_0_and_1(w2_std):
    model = create('awm_resnet14_cifar', w2_std).double()
    x = images(batch=4, size=32)
    with record_mixing_weights(model) as lambdas, torch.no_grad():
        model.eval()(x)
    weights = torch.cat(list(lambdas.values()))
    assert weights.min() < 1e-6 and weights.max() > 1 - 1e-6
    plain, fused = both(model.train(), train_step(x))
    assert difference(plain, fused) < 1e-7


def paths_of(norm, shortcut_norm, act, pooled, dtype=torch.float64):
    torch.manual_seed(0)
    mix = MixingWeights(2 * 5, 2, 4, dtype=dtype)
    nn.init.normal_(mix.weight2)
    u, v = torch.randn(2, 3, 5, 2, 3, dtype=dtype)
    return (
        mix,
        u.contiguous(memory_format=NHWC).requires_grad_(),
        v.contiguous(memory_format=NHWC).requires_grad_(),
        nn.BatchNorm2d(5, dtype=dtype) if norm else None,
        nn.BatchNorm2d(5, dtype=dtype) if shortcut_norm else None,
        nn.ReLU() if act else None,
        torch.randn(3, 5, dtype=dtype, requires_grad=True) if pooled else None,
    )


@pytest.mark.parametrize('norm, shortcut_norm', [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize('act', [True, False])
@pytest.mark.parametrize('pooled', [True, False])
def test_gradients_of_a_merge(norm, shortcut_norm, act, pooled):
    if shortcut_norm:
        pooled = False  # what is normalised is pooled anyway
    mix, u, v, norm, shortcut_norm, act, pooled = paths_of(norm, shortcut_norm, act, pooled)

    def run(*_):
        return fused_merge(mix, u, v, norm, shortcut_norm, act, pooled)

    params = [p for m in (mix, norm, shortcut_norm) if m is not None for p in m.parameters()]
    inputs = (u, v, *params, *([] if pooled is None else [pooled]))
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_gradients_of_a_concatenation(training, relu):
    torch.manual_seed(0)
    channels = [3, 1, 2]
    mix = MixingWeights(6, 3, 4, dtype=torch.float64)
    nn.init.normal_(mix.weight2)
    norm = nn.BatchNorm2d(6, dtype=torch.float64).train(training)
    maps = [torch.randn(3, c, 2, 3, dtype=torch.float64, requires_grad=True) for c in channels]

    def run(*_):
        kept = [map_moments(x, variance=True) for x in maps]
        return fused_concat(mix, *map(list, zip(*kept)), norm, relu)

    assert torch.autograd.gradcheck(run, (*maps, *mix.parameters(), *norm.parameters()))


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_second_derivatives(name):
    def run(model):
        x = images(batch=2, size=16).requires_grad_()
        grad, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (grad.square().sum() * 1e-3).backward()
        return dict(x=x.grad, **{n: p.grad for n, p in model.named_parameters()})

    plain, fused = both(create(name).double(), run)
    assert difference(plain, fused) < 1e-8


@pytest.mark.parametrize('kwargs', [dict(momentum=None), dict(track_running_stats=False), dict(eps=0.1, momentum=0.3)])
@pytest.mark.parametrize('training', [True, False])
def test_batchnorm_is_torchs(kwargs, training, calls):
    torch.manual_seed(0)
    merge = SumMerge(6)
    nn.init.normal_(merge.mix.weight2)
    norm, act = nn.BatchNorm2d(6, **kwargs), nn.ReLU()
    reference = copy.deepcopy(norm)
    with torch.no_grad():
        for i in range(3):
            for m in (norm, reference):
                m.train(training or i == 0)
            u, x = torch.randn(2, 4, 6, 3, 5) * 3 + 10
            fused, pooled = fused_merge(merge.mix, u, x, norm, None, act)
            count = len(calls)
            set_fused_merge(False)
            expected = act(merge(reference(u), x))
            set_fused_merge(True)
            assert len(calls) == count
            torch.testing.assert_close(fused, expected)
            torch.testing.assert_close(pooled, expected.mean((2, 3)))
    torch.testing.assert_close(norm.state_dict(), reference.state_dict())


def test_a_single_value_per_channel_is_torchs_error():
    model = create('awm_resnet18')
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(torch.randn(1, 3, 32, 32))


BLOCKS = dict(
    se=dict(block_args=dict(attn_layer='se')),
    drop_path=dict(drop_path_rate=0.5),
    silu=dict(act_layer=nn.SiLU),
    group_norm=dict(norm_layer=lambda channels, **kwargs: nn.GroupNorm(4, channels, **kwargs)),
    no_affine=dict(norm_layer=lambda channels, **kwargs: nn.BatchNorm2d(channels, affine=False, **kwargs)),
    anti_aliasing=dict(aa_layer=BlurPool2d),
)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('case', [*BLOCKS, 'no_norm', 'frozen_statistics', 'synced', 'float16'])
def test_other_blocks_are_the_plain_formula(case, training):
    block = create('awm_resnet26d', **BLOCKS.get(case, {})).layer2[1].double().train(training)
    if case == 'no_norm':
        block.bn3 = nn.Identity()
    if case == 'frozen_statistics':
        freeze(block, include_bn_running_stats=True)
        block.bn3.weight.requires_grad_()
    if case == 'synced':
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block).eval()  # it trains on GPUs only
    dtype = torch.float16 if case == 'float16' else torch.float64
    block.to(dtype)
    x = torch.randn(4, 512, 6, 6).to(dtype)

    def run(block):
        torch.manual_seed(0)
        out = block(x)
        out.double().square().mean().backward()
        return dict(out=out, **{n: p.grad for n, p in block.named_parameters() if p.grad is not None})

    plain, fused = both(block, run)
    assert difference(plain, fused) < (1e-10 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize('path', ['bn3', 'act3', 'merge', 'merge.mix', 'conv3', 'downsample', 'downsample.1', ''])
@pytest.mark.parametrize('training', [True, False])
def test_hooks_see_what_they_see_in_the_plain_formula(path, training):
    stage = create('awm_resnet26d').layer2.double().train(training)
    x = torch.randn(4, 256, 6, 6, dtype=torch.float64)

    def run(stage):
        seen = []
        stage[0].get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.set_grad_enabled(training):
            stage(x)
        return dict(seen=seen[0])

    plain, fused = both(stage, run)
    assert isinstance(fused['seen'], Tensor) and difference(plain, fused) < 1e-10


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('hook', ['after', 'before', 'everywhere', 'instance', 'subclass'])
def test_what_changes_a_modules_call_is_obeyed(hook, training):
    stage = create('awm_resnet26d').layer2.double().train(training)
    x = torch.randn(4, 256, 6, 6, dtype=torch.float64)

    def double(module, args, out):
        return 2 * out if isinstance(module, nn.BatchNorm2d) and module.num_features == 512 else None

    def run(stage):
        conv = stage[1].conv3
        handle = None
        if hook == 'after':
            conv.register_forward_hook(lambda module, args, out: out + 1)
        elif hook == 'before':
            conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        elif hook == 'everywhere':
            handle = nn.modules.module.register_module_forward_hook(double)
        elif hook == 'instance':
            stage[1].bn3.forward = lambda x: 3 * x
        else:
            stage[1].__class__ = type('Mine', (type(stage[1]),), dict(forward=lambda self, x: 5 * x))
        with torch.set_grad_enabled(training):
            out = stage(x)
        if handle:
            handle.remove()
        return dict(out=out)

    plain, fused = both(stage, run)
    assert difference(plain, fused) < 1e-10


def test_gradients_that_others_hold_stay_as_they_are():
    def run(model):
        kept = []
        layer = model.features.denseblock1.denselayer3
        layer.register_forward_pre_hook(lambda module, args: [x.register_hook(kept.append) for x in args[0]] and None)
        model(images(size=32)).square().mean().backward()
        return {str(i): g for i, g in enumerate(kept)}

    model = create('awm_densenet22_cifar').double()
    first, second = run(copy.deepcopy(model)), run(copy.deepcopy(model))
    assert len(first) == 3 and difference(first, second) == 0
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y, mean, var = map_moments(x, variance=True)
    grad = torch.ones_like(x)
    torch.autograd.backward([y, mean, var], [grad, torch.ones(2, 3), torch.ones(2, 3)])
    assert torch.equal(grad, torch.ones_like(x)) and not torch.equal(x.grad, grad)


def test_backward_twice():
    model = create('awm_resnet14_cifar').double()
    loss = model(images(size=32)).square().mean()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    assert difference({n: 2 * g for n, g in once.items()}, {n: p.grad for n, p in model.named_parameters()}) < 1e-14


def test_batched_gradients():
    merge = create('awm_resnet14_cifar').layer1[0].merge.double()
    u, x = torch.randn(2, 2, 16, 2, 2, dtype=torch.float64)
    one_by_one = torch.autograd.functional.jacobian(merge, (u, x))
    torch.testing.assert_close(torch.autograd.functional.jacobian(merge, (u, x), vectorize=True), one_by_one)


def test_transforms_see_the_plain_formula():
    merge = create('awm_resnet14_cifar').layer1[0].merge.double()
    u, x, tangent = torch.randn(3, 2, 16, 4, 4, dtype=torch.float64)
    set_fused_merge(False)
    expected = torch.autograd.functional.jvp(lambda u: merge(u, x), u, tangent)[1]
    set_fused_merge(True)
    torch.testing.assert_close(torch.func.jvp(lambda u: merge(u, x), (u,), (tangent,))[1], expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda u, x: merge(u[None], x[None]).square().sum()))(u, x)
    leaf = u.clone().requires_grad_()
    merge(leaf, x).square().sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(merge(dual, x)).tangent, expected)
    traced = torch.jit.trace(merge, (u, x))
    torch.testing.assert_close(traced(u + 1, x), merge(u + 1, x))


def test_blocks_hand_the_means_of_their_maps_on(calls):
    model = create('awm_resnet14_cifar')
    model(images(batch=2, size=32, dtype=torch.float32))
    assert calls.count('mean') == 1  # of what the stem makes: all else comes by the way
    assert calls.count('moments') == 6 + 2  # one a BatchNorm, the down-sampling ones too


def test_inference_pools_the_narrow_map_before_the_last_convolution(monkeypatch):
    pooled = []
    mean = passes.mean
    monkeypatch.setattr(passes, 'mean', lambda x: pooled.append(x.shape[1]) or mean(x))
    model = create('awm_resnet26d').eval()
    with torch.no_grad():
        model(images(batch=8, size=128, dtype=torch.float32))
    # of each block's inner map, but the last stage's, whose weights are more to read than its map; of the shortcut in
    # the first block of a stage only, for the second is left its mean
    assert pooled == [64, 256, 64, 128, 512, 128, 256, 1024, 256, 2048, 2048, 2048]


def test_dense_blocks_read_each_map_once_for_its_moments(calls):
    model = create('awm_densenet22_cifar')
    model(images(batch=2, size=32, dtype=torch.float32))
    assert calls.count('moments') == 3 * 4  # three blocks, each of its input and three layers
    assert calls.count('affine_act') == 9 and 'mean' not in calls


def test_the_step_keeps_no_more_than_the_plain_network():
    kept = {}
    for name, awm in (('plain', False), ('awm', True)):
        model = create('awm_resnet26d', awm=awm)
        seen = {}

        def keep(x, seen=seen):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(images(batch=8, size=96, dtype=torch.float32))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[name] = sum(size for pointer, size in seen.items() if pointer not in weights)
        del out
    assert kept['awm'] < 1.03 * kept['plain']


def test_without_a_compiler_the_plain_formula_is_used_and_said_once(monkeypatch):
    from torch._inductor.codecache import CppCodeCache

    def load(*_):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(CppCodeCache, 'load', load)
    cpu_kernels._library.cache_clear()
    merge = SumMerge(4)
    u, x = torch.randn(2, 2, 4, 3, 3)
    try:
        with pytest.warns(UserWarning, match='could not be built.*TIMM_AWM_FUSED=0.*no compiler'):
            assert torch.equal(merge(u, x), u + x)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            merge(u, x)
    finally:
        cpu_kernels._library.cache_clear()


@pytest.mark.parametrize('value, state', [('0', (False, False)), ('1', (True, False)), ('2', (True, True))])
def test_the_environment_says_how_the_switch_starts(value, state):
    code = 'from timm_awm.layers import fused; print((fused._enabled, fused._experimental))'
    env = {**os.environ, 'TIMM_AWM_FUSED': value}
    result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(state)


def test_another_value_in_the_environment_is_refused():
    env = {**os.environ, 'TIMM_AWM_FUSED': 'off'}
    result = subprocess.run([sys.executable, '-c', 'import timm_awm'], env=env, capture_output=True, text=True)
    assert result.returncode and "is 0 (off), 1 (on) or 2 (on GPUs too), not 'off'" in result.stderr


def test_the_switch(calls):
    merge = SumMerge(4)
    u, x = torch.randn(2, 2, 4, 3, 3)
    merge(u, x)
    assert calls
    calls.clear()
    set_fused_merge(False)
    merge(u, x)
    ConcatMerge([4, 4])([u, x])
    assert not calls
    timm_awm.set_fused_merge()
    merge(u, x)
    assert calls


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_compiled_and_eager_are_the_same(name):
    model = create(name).double()
    x = images(batch=2, size=32)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    eager = train_step(x)(model)
    out = compiled(x)
    out.square().mean().backward()
    torch.testing.assert_close(out, eager['out'])
    for n, p in compiled._orig_mod.named_parameters():
        torch.testing.assert_close(p.grad, eager[n])


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_inductor_under_autocast(name):
    model = create(name).to(memory_format=NHWC)
    x = images(batch=16, size=32, dtype=torch.float32)
    step = train_step(x, autocast=torch.bfloat16)
    set_fused_merge(False)
    exact = train_step(x.double())(copy.deepcopy(model).double())
    set_fused_merge(True)
    eager = step(copy.deepcopy(model))
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True)
    result = step(compiled)
    assert difference(exact, result) < max(0.1, 3 * difference(exact, eager))


def test_frozen_layers_before_a_merge_need_no_gradient():
    model = create('awm_resnet14_cifar')
    freeze(model, 'layer1')
    model(images(batch=2, size=32, dtype=torch.float32)).sum().backward()
    assert all((p.grad is None) == n.startswith('layer1.') for n, p in model.named_parameters())
