"""The fused merges against the plain formula, which test_layers and test_models hold to the paper's equations."""
import copy
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, create, images, trained, vary_norms
from timm.layers import BatchNormAct2d, BlurPool2d
from timm.utils import freeze
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_awm.layers import ConcatMerge, MixingWeights, SumMerge, set_fused_merge

NHWC, NCHW = torch.channels_last, torch.contiguous_format
both_modes = pytest.mark.parametrize('training', [True, False])


@pytest.fixture(autouse=True)
def switched_on():
    set_fused_merge(True)


def network(name, **kwargs):
    return vary_norms(create(name, away=True, num_classes=10, **kwargs))


def both(model, run):
    """run of a copy of the model by the plain formula, and of another fused."""
    results = []
    for fused in (False, True):
        set_fused_merge(fused)
        results.append(run(copy.deepcopy(model)))
    return results


def train_step(x):
    def run(model):
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
def test_training_step(name, side, layout):
    model = network(name).double().to(memory_format=layout)
    for n, p in model.named_parameters():
        p.requires_grad_(side == 'both' or ('.merge.' in n) == (side == 'merge'))
    x = images(3, 48, dtype=torch.float64).contiguous(memory_format=layout)
    plain, fused = both(model, train_step(x))
    assert 0 < difference(plain, fused) < 1e-9  # it rounds otherwise, so it is fused


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('name', SMALL)
def test_inference(name, layout):
    model = network(name).double().to(memory_format=layout).eval()
    x = images(3, 48, dtype=torch.float64).contiguous(memory_format=layout)
    kept = x.clone()
    with torch.no_grad():
        plain, fused = both(model, lambda m: dict(out=m(x)))
    assert 0 < difference(plain, fused) < 1e-12 and torch.equal(x, kept)


@both_modes
@pytest.mark.parametrize('normed', [True, False])
@pytest.mark.parametrize('kind', [SumMerge, ConcatMerge])
def test_gradients_and_their_gradients(kind, normed, training):
    torch.manual_seed(0)
    channels, norm = ([5, 5], nn.BatchNorm2d(5)) if kind is SumMerge else ([3, 1, 2], BatchNormAct2d(6))
    merge = trained(kind(5 if kind is SumMerge else channels, 4)).double()
    norm = norm.double().train(training) if normed else None
    maps = [torch.randn(3, c, 2, 3, dtype=torch.float64, requires_grad=True) for c in channels]

    def run(*inputs):
        maps = inputs[:len(channels)]
        return merge.fused(*maps, norm, nn.ReLU()) if kind is SumMerge else merge.fused(list(maps), norm)

    inputs = (*maps, *merge.parameters(), *(norm.parameters() if normed else ()))
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@both_modes
@pytest.mark.parametrize('kwargs', [dict(momentum=None), dict(track_running_stats=False), dict(eps=0.1, momentum=0.3)])
def test_batchnorm_is_torchs(kwargs, training):
    torch.manual_seed(0)
    merge, norm, act = trained(SumMerge(6)), nn.BatchNorm2d(6, **kwargs), nn.ReLU()
    reference = copy.deepcopy(norm)
    for i in range(3):
        for m in (norm, reference):
            m.train(training or i == 0)
        u, x = torch.randn(2, 4, 6, 3, 5) * 3 + 10
        set_fused_merge(True)
        fused = merge.fused(u, x, norm, act)
        set_fused_merge(False)
        torch.testing.assert_close(fused, act(merge(reference(u), x)))
    torch.testing.assert_close(norm.state_dict(), reference.state_dict())


class Watched(nn.Parameter):
    """A parameter with functions of its own, as libraries have them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def statistics_elsewhere(merge):
    norm = nn.BatchNorm2d(6)
    norm.running_mean, norm.running_var = norm.running_mean.to('meta'), norm.running_var.to('meta')
    return norm


MISFITS = {
    'statistics elsewhere': statistics_elsewhere,
    'norm of fewer channels': lambda merge: nn.BatchNorm2d(5),
    'norm elsewhere': lambda merge: nn.BatchNorm2d(6, device='meta'),
    'wide norm': lambda merge: nn.BatchNorm2d(6, dtype=torch.float64),
    'W1 of fewer channels': lambda merge: setattr(merge.mix, 'weight1', nn.Parameter(torch.randn(16, 11))),
    'W2 of another class': lambda merge: setattr(merge.mix, 'weight2', Watched(merge.mix.weight2.data)),
    'W2 elsewhere': lambda merge: setattr(merge.mix, 'weight2', nn.Parameter(merge.mix.weight2.to('meta'))),
}


@both_modes
@pytest.mark.parametrize('how', MISFITS)
def test_what_does_not_fit_is_left_to_torch(how, training):
    """The kernels read memory, and nobody else would look."""
    merge = SumMerge(6)
    norm = MISFITS[how](merge) or nn.BatchNorm2d(6)
    u, x = torch.randn(2, 2, 6, 3, 3)
    assert merge.fused(u, x, norm.train(training), nn.ReLU()) is None


def test_a_single_value_per_channel_is_torchs_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        create('awm_resnet18')(images(1))


BLOCKS = dict(
    se=dict(block_args=dict(attn_layer='se')),
    drop_path=dict(drop_path_rate=0.5),
    silu=dict(act_layer=nn.SiLU),
    group_norm=dict(norm_layer=lambda channels, **kwargs: nn.GroupNorm(4, channels, **kwargs)),
    no_affine=dict(norm_layer=lambda channels, **kwargs: nn.BatchNorm2d(channels, affine=False, **kwargs)),
    anti_aliasing=dict(aa_layer=BlurPool2d),
)


@both_modes
@pytest.mark.parametrize('case', [*BLOCKS, 'no_norm', 'empty_shortcut', 'frozen_statistics', 'synced', 'float16'])
def test_other_blocks_are_the_plain_formula(case, training):
    block = network('awm_resnet26d', **BLOCKS.get(case, {})).layer2[1].double().train(training)
    if case == 'no_norm':
        block.bn3 = nn.Identity()
    if case == 'empty_shortcut':
        block.downsample = nn.Sequential()
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
        return train_step(x)(block)

    plain, fused = both(block, run)
    assert difference(plain, fused) < (1e-10 if dtype == torch.float64 else 1e-2)


class Add(nn.Module):
    def forward(self, branch, shortcut):
        return branch + 2 * shortcut


class Swapped(nn.Sequential):
    """Around the FC layers, as what adapts their weights is."""

    def forward(self, z):
        return super().forward(z).flip(1)


def subclass(module):
    """Makes it of a subclass that doubles the output and keeps it."""
    own = type(module)

    def forward(self, *args):
        self.kept = 2 * own.forward(self, *args)
        return self.kept
    module.__class__ = type('Doubled', (own,), dict(forward=forward))


CHANGES = {  # one of a block's modules is not what it seems
    'subclass of the norm': lambda b: subclass(b.bn3),
    'forward of the norm': lambda b: setattr(b.bn3, 'forward', lambda x: 3 * x),
    'hook on the convolution': lambda b: b.conv3.register_forward_hook(lambda module, args, out: out.square()),
    'pre-hook on the norm': lambda b: b.bn3.register_forward_pre_hook(lambda module, args: (args[0].square(),)),
    'parametrisation': lambda b: torch.nn.utils.parametrize.register_parametrization(b.bn3, 'weight', nn.Softplus()),
    'subclass of the convolution': lambda b: subclass(b.conv3),
    'convolution of their own': lambda b: setattr(b, 'conv3', nn.Sequential(b.conv3, nn.Hardtanh())),
    'another merge': lambda b: setattr(b, 'merge', Add()),
    'subclass of the merge': lambda b: subclass(b.merge),
    'wrapper around the FC layers': lambda b: setattr(b.merge, 'mix', Swapped(b.merge.mix)),
    'another act': lambda b: setattr(b, 'act3', nn.LeakyReLU(inplace=True)),
    'subclass of the block': lambda b: subclass(b),
}


@both_modes
@pytest.mark.parametrize('how', CHANGES)
def test_what_changes_a_modules_call_is_obeyed(how, training):
    stage = network('awm_resnet26d').layer2.double().train(training)
    x = torch.randn(4, 256, 6, 6, dtype=torch.float64)

    def run(stage):
        with torch.set_grad_enabled(training):
            out = stage(x)
        return dict(out=out, kept=getattr(stage[1].conv3, 'kept', out))

    before = run(copy.deepcopy(stage))

    def changed(stage):
        CHANGES[how](stage[1])
        return run(stage)

    plain, fused = both(stage, changed)
    assert difference(plain, fused) < 1e-10 < difference(before, plain)


@both_modes
@pytest.mark.parametrize('path', ['bn3', 'act3', 'merge', 'merge.mix', 'conv3', 'downsample'])
def test_hooks_see_what_they_see_in_the_plain_formula(path, training):
    stage = network('awm_resnet26d').layer2.double().train(training)
    x = torch.randn(4, 256, 6, 6, dtype=torch.float64)

    def run(stage):
        seen = []
        stage[0].get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.set_grad_enabled(training):
            stage(x)
        return dict(seen=seen[0])

    plain, fused = both(stage, run)
    assert isinstance(fused['seen'], Tensor) and difference(plain, fused) < 1e-10


def test_hooks_on_all_modules_of_the_process():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 2 * out if isinstance(module, nn.BatchNorm2d) and len(module.weight) == 512 else None)
    try:
        x = torch.randn(4, 256, 6, 6, dtype=torch.float64)
        plain, fused = both(network('awm_resnet26d').layer2.double(), lambda stage: dict(out=stage(x)))
    finally:
        handle.remove()
    assert difference(plain, fused) < 1e-10


def test_inputs_stay_as_they_are():
    inputs = torch.randn(2, 3, 4, 5, 5)
    kept = inputs.clone()
    with torch.inference_mode():
        trained(SumMerge(4))(*inputs)
        trained(ConcatMerge([4, 4]))(list(inputs))
    assert torch.equal(inputs, kept)


def doubled(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


class DoubledRelu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.relu else out


class DoubledOutput(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if 'relu' in func.name() else out


@both_modes
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
@pytest.mark.parametrize('owner, function', [
    (nn.BatchNorm2d, 'forward'), (BatchNormAct2d, 'forward'), (nn.ReLU, 'forward'), (nn.Conv2d, 'forward'),
    (SumMerge, 'forward'), (ConcatMerge, 'forward'), (MixingWeights, 'forward'), (nn.ReLU, '__call__'),
    (F, 'batch_norm'), (F, 'relu'), (torch, 'relu'), (DoubledRelu, None), (DoubledOutput, None)], ids=str)
def test_what_is_replaced_for_the_whole_process_is_obeyed(owner, function, name, training, monkeypatch):
    """At a class, in torch's functions, by a mode: the plain formula, and nothing that a convolution made is lost."""
    model = network(name).double().train(training)
    x = images(dtype=torch.float64)
    kept = []

    def run(model):
        with owner() if function is None else nullcontext(), torch.set_grad_enabled(training):
            return dict(out=model(x))

    if owner is nn.Conv2d:
        def keep(self, x, own=nn.Conv2d.forward):
            y = own(self, x)
            kept.append((y, y.clone()))
            return y
        monkeypatch.setattr(nn.Conv2d, 'forward', keep)
    elif function is not None:
        monkeypatch.setattr(owner, function, doubled(getattr(owner, function)))
    plain, fused = both(model, run)
    assert difference(plain, fused) == 0 and all(torch.equal(y, copied) for y, copied in kept)


@pytest.mark.parametrize('norm', [None, nn.BatchNorm2d(4)], ids=['alone', 'norm'])
def test_a_default_device_changes_nothing(norm):
    merge, x = SumMerge(4), torch.randn(2, 4, 3, 3, requires_grad=True)
    with torch.device('meta'):
        y = merge.fused(x, x, norm)
        y.sum().backward()
    torch.testing.assert_close(y, 2 * x if norm is None else norm(x) + x)


def test_what_the_kernels_cannot_read_is_left_to_torch():
    merge, x = SumMerge(4), torch.randn(2, 4, 3, 3)
    assert merge.fused(x, x, nn.BatchNorm2d(4)) is not None
    assert merge.fused(torch._neg_view(x), x) is None
    assert merge.fused(x[..., None], x[..., None]) is None
    assert merge.fused(x.to_sparse(), x.to_sparse()) is merge.fused(x.to_mkldnn(), x.to_mkldnn()) is None
    for module, names in (merge.mix, ('weight1', 'weight2')), (norm := nn.BatchNorm2d(4), ('weight', 'bias')):
        for name in names:  # as in a replica of DataParallel
            p = module._parameters.pop(name)
            setattr(module, name, p.detach())
        assert merge.fused(x, x, norm) is None


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_batches_of_gradients(name):
    x = images(dtype=torch.float64)

    def run(model):
        weights = [p for n, p in model.named_parameters() if n.endswith('weight1') or 'norm' in n or 'bn' in n]
        grads = torch.autograd.grad(model(x).sum(0), weights, torch.eye(10).double(), is_grads_batched=True)
        return {'jacobian': jacobian(model, x, vectorize=True), **{str(i): g for i, g in enumerate(grads)}}

    plain, fused = both(network(name).double(), run)
    assert difference(plain, fused) < 1e-9


def test_transforms_see_the_plain_formula():
    merge = trained(SumMerge(16)).double()
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


def test_the_step_keeps_no_more_than_the_plain_network():
    for name in ('awm_resnet50', 'awm_densenet121'):
        kept = {}
        for awm in (False, True):
            model = create(name, awm=awm)
            seen = {}

            def keep(x, seen=seen):
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = model(images(1, 128))
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            kept[awm] = sum(size for pointer, size in seen.items() if pointer not in weights)
            del out
        assert kept[True] < (0.85 if 'dense' in name else 1.1) * kept[False], name


MERGE = """
import torch
from timm_awm.layers import SumMerge
merge, x = SumMerge(4), torch.ones(2, 4, 3, 3)
print(merge.fused(x, x) is not None, torch.equal(merge(x, x), 2 * x))
"""


def run_merge(*flags, before='', **env):
    return subprocess.run(
        [sys.executable, *flags, '-c', before + MERGE], env={**os.environ, **env}, capture_output=True, text=True)


def test_what_was_replaced_before_the_import_is_obeyed():
    result = run_merge(before='from torch import nn; nn.ReLU.forward = lambda self, x: x')
    assert result.stdout.endswith('False True\n'), result.stderr


@pytest.mark.parametrize('env, why', [
    (dict(CXX='no-such-compiler'), 'no-such-compiler'), (dict(TORCHINDUCTOR_CACHE_DIR='{}/a b'), 'a b|fatal error')])
def test_where_they_cannot_be_built_the_plain_formula_is_used_and_said_once(env, why, tmp_path):
    env = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path), **{k: v.format(tmp_path) for k, v in env.items()}}
    result = run_merge('-W', 'error::UserWarning', **env)
    assert result.stdout.endswith('False True\n'), result.stderr
    assert result.stderr.count('could not be built') == 1
    assert re.search(f'(?s)need g.. or clang.*TORCHINDUCTOR_CACHE_DIR.*TIMM_AWM_FUSED=0.*({why})', result.stderr)


@pytest.mark.parametrize('value, fused', [('0', False), ('true', True)])
def test_the_environment_says_how_the_switch_starts(value, fused):
    result = run_merge(TIMM_AWM_FUSED=value)
    assert result.stdout.endswith(f'{fused} True\n')
    assert ("is 0 (off), 1 (on) or 2 (on accelerators too); 'true'" in result.stderr) == (value == 'true')


@pytest.mark.slow
def test_building_is_said_once_and_nothing_else(tmp_path):
    for times in (1, 0):
        result = run_merge(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CUDA_HOME=str(tmp_path))
        assert result.stdout.endswith('True True\n')
        assert result.stderr.count('timm_awm builds its fused merge, once') == times and 'CUDA' not in result.stderr


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_the_compiled_tail_of_accelerators(name, training, monkeypatch):
    """Here on the CPU, and of other batch sizes: as the plain formula in float64."""
    model = network(name)
    block = (model.features.denseblock1.denselayer3 if 'dense' in name else model.layer1[1]).train(training)
    monkeypatch.setattr('timm_awm.layers.fused._CPP_DEVICES', ())
    for batch in (4, 3):
        x = images(batch, 8, 48 if 'dense' in name else 16)
        maps = list(x.split([24, 12, 12], dim=1)) if 'dense' in name else x
        set_fused_merge(False)
        exact = train_step([m.double() for m in maps] if 'dense' in name else x.double())(copy.deepcopy(block).double())
        set_fused_merge(experimental=True)
        with torch.profiler.profile() as profile:
            assert difference(exact, train_step(maps)(copy.deepcopy(block))) < 1e-4
        assert any('Compiled' in event.key for event in profile.key_averages())
        with torch.compiler.set_stance('force_eager'):
            assert difference(exact, train_step(maps)(copy.deepcopy(block))) < 1e-4
