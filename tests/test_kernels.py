"""The operators against the formula in float64: in C++ on the CPU, in Triton's interpreter, on a GPU if there is one.

Triton decides when it is imported whether it interprets, and torch.compile imports it in other tests of the process. So
the interpreter has a process of its own, in which this file runs again.
"""
import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_awm.layers import kernels

GPU = torch.cuda.is_available()
TRITON = 'TRITON_INTERPRET' in os.environ or GPU
NHWC, NCHW = torch.channels_last, torch.contiguous_format
SHAPES = [(3, 5, 7, 9), (1, 16, 6, 6), (2, 24, 1, 1), (6, 2, 5, 3), (2, 130, 3, 3), (1, 2048, 2, 3)]
LARGE = [(1, 16, 64, 50), (2, 3, 65, 67), (64, 70, 2, 2)]  # of many tiles and blocks, of many images
DTYPES = [torch.float32, torch.bfloat16, torch.float16 if TRITON else torch.float64]
TENSORS = 'u', 'v', 'weight1', 'weight2', 'gamma', 'beta'  # in the order of arguments and gradients

both_layouts = pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
both_kinds = pytest.mark.parametrize('kind', ['sum', 'concatenation'])
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed')


def maps(n, shape, dtype=torch.float32, layout=NHWC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def arguments(shape, kind='sum', training=True, relu=True, dtype=torch.float32, layout=NHWC):
    """A gradient, and arguments of `merge`."""
    grad, u, v = maps(3, shape, dtype, layout)
    c = shape[1]
    channels = [c, c] if kind == 'sum' else [c - c // 2, c // 2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(1)
    weight1, weight2, gamma, beta, mean, var = (
        torch.randn(*size, generator=generator, dtype=wide) for size in ((9, sum(channels)), (2, 9), *4 * [(c,)]))
    gamma[::3], gamma[1::5] = 0.004, 0.
    running = (None, None) if training else (mean, var.square() + 0.1)
    return grad, (u, v if kind == 'sum' else None, weight1 / 5, weight2, gamma, beta, *running, 1e-5, channels, relu)


def call(name, *args):
    """An operator's results, on the CPU; its arguments must stay as they are."""
    given = tuple(x.cuda() if GPU and isinstance(x, Tensor) else x for x in copy.deepcopy(args))
    results = getattr(kernels, name)(*given)
    for x, y in zip(given, args, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x.cpu().nan_to_num(77), y.nan_to_num(77))
    return [x if x is None else x.cpu() for x in results]


def merge(grad, args):
    """The result and the gradients, by name."""
    y, saved, _ = call('merge', *args)
    return dict(zip(('y', *TENSORS), (y, *call('merge_backward', grad, saved, *args)), strict=True))


def reference(grad, args):
    """As docs/method.md has it, with torch's BatchNorm, in float64: the result and the gradients."""
    leaves = [x if x is None else x.double().requires_grad_() for x in args[:6]]
    u, v, weight1, weight2, gamma, beta = leaves
    running_mean, running_var, eps, channels, relu = args[6:]

    def norm(x):
        running = [x if x is None else x.double() for x in (running_mean, running_var)]
        return F.batch_norm(x, *running, gamma, beta, running_mean is None, eps=eps)

    def weigh(*paths):
        z = torch.cat([path.mean((2, 3)) for path in paths], dim=1)
        sigma = (F.relu(z @ weight1.T) @ weight2.T).sigmoid()
        scales = len(paths) * sigma / sigma.sum(1, keepdim=True)
        return [scales[:, i, None, None, None] * path for i, path in enumerate(paths)]

    y = norm(torch.cat(weigh(*u.split(channels, dim=1)), dim=1)) if v is None else sum(weigh(norm(u), v))
    y = y.relu() if relu else y
    grads = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], grad.double()))
    return dict(zip(('y', *TENSORS), (y.detach(), *(x if x is None else next(grads) for x in leaves))))


def check(grad, args):
    """Within the rounding of the widest terms, and once that of the maps' dtype; maps are laid out as u."""
    u = args[0]
    layout = NCHW if u.is_contiguous() else NHWC
    truncates = TRITON and not GPU  # the interpreter, to bfloat16
    unit = {torch.bfloat16: 2 ** (-7 if truncates else -8), torch.float16: 2 ** -11}.get(u.dtype, 0)
    actual = merge(grad, args)
    for name, expected in reference(grad, args).items():
        x = actual[name]
        if expected is None and x is None:
            continue
        assert x.dtype == (u if expected.ndim == 4 else args[2]).dtype and x.shape == expected.shape
        assert expected.ndim < 4 or x.is_contiguous(memory_format=layout)
        bound = (1e-12 if u.dtype == torch.float64 else 1e-4) * (1 + expected.abs().max())
        if expected.ndim == 4:
            bound = bound + unit * expected.abs() + (1e-7 if unit else 0)
        error = (x.double() - expected).abs()
        assert (error <= bound).all(), (name, (error - bound).max())


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + LARGE, ids=str)
def test_merge_and_its_gradients(shape, layout):
    for dtype in DTYPES:
        for kind, training, relu in (
                ('sum', True, True), ('sum', False, False), ('concatenation', True, False),
                ('concatenation', False, True)):
            grad, args = arguments(shape, kind, training, relu, dtype, layout)
            if relu:  # at its edge rounding decides
                grad = grad * (reference(grad, (*args[:-1], False))['y'].abs() > 1e-3)
            check(grad, args)


@pytest.mark.skipif(TRITON, reason='of the C++ kernels')
@both_layouts
@both_kinds
@pytest.mark.parametrize('shape', [(2, 130, 15, 15), (4, 2048, 2, 2)], ids=str)
def test_several_threads(shape, kind, layout):
    """Bands of channels, where there are fewer images than threads; many images or channels for the small layers."""
    torch.set_num_threads(3)
    try:
        check(*arguments(shape, kind, relu=False, layout=layout))
    finally:
        torch.set_num_threads(1)


@both_kinds
def test_saturated_sigmoids(kind):
    """σ would be 0 in float32, and the reference is not in float64."""
    grad, (u, v, weight1, weight2, *args) = arguments((4, 8, 3, 5), kind)
    args = u, v, weight1, -40 * weight2.abs(), *args
    actual, expected = merge(grad, args), reference(grad, args)
    for name in ('y', 'u'):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-3, atol=1e-3)
    assert all(x is None or x.isfinite().all() for x in actual.values())


@both_layouts
@pytest.mark.parametrize('shape', [(2, 5, 9, 11), LARGE[0]], ids=str)
def test_moments_of_large_means_and_outliers(shape, layout):
    _, (x, *args) = arguments(shape, layout=layout)

    def moments(x):
        return call('merge', x, *args)[1][3:5].double()

    x = x * 0.1 + 100
    x[:, ::2] -= 200
    mean, var = moments(x)
    torch.testing.assert_close(mean, x.double().mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, x.double().var((2, 3), correction=0), rtol=1e-4, atol=0)
    for zeros in (slice(1), slice(1)), (slice(1), slice(None)):  # as padding may make the first pixel, or row
        x[:, :, zeros[0], zeros[1]] = 0.
        torch.testing.assert_close(moments(x)[1], x.double().var((2, 3), correction=0), rtol=1e-5, atol=0)
    assert not moments(x * 0 + 3)[1].any()  # a constant map


@pytest.mark.parametrize('first', [NHWC, NCHW], ids=['nhwc', 'nchw'])
def test_mixed_layouts(first):
    other = NCHW if first == NHWC else NHWC
    shape = 2, 6, 5, 7
    grad, (u, v, weight1, *args) = arguments(shape, layout=other)
    u = u.contiguous(memory_format=first)
    check(grad, (u, v, weight1.t().contiguous().t(), *args))
    check(torch.tensor(0.3).expand(shape), (u, v, weight1, *args))  # as a mean's gradient is
    strided = torch.zeros(*shape[:3], 2 * shape[3])[..., ::2].copy_(u)  # neither layout
    check(grad, (strided, v, weight1, *args))


def at_the_edge(layout):
    """A gradient, and arguments for y = relu(γ · u + v + β): W2 is zero, and BatchNorm has running statistics."""
    grad, (u, v, weight1, weight2, gamma, beta, mean, var, eps, *args) = arguments(
        (2, 16, 16, 16), training=False, layout=layout)
    return grad.abs() + 0.1, (
        u, v, weight1, 0 * weight2, gamma.abs() + 0.1, 1e-7 * beta, 0 * mean, 0 * var + 1, 0., *args)


@both_layouts
def test_nan_and_the_edge_of_the_relu(layout):
    grad, args = at_the_edge(layout)
    u, v, gamma, beta = args[0], args[1], args[4], args[5]
    u[0, 1, 2, 3] = float('nan')
    gamma[3], beta[3], u[1, 3], v[1, 3] = 2., 1., 0.5, -2.  # y is 0
    actual = merge(grad, args)
    expected = reference(grad, args)
    assert actual['y'][0].isnan().all()  # λ is
    torch.testing.assert_close(actual['y'].double(), expected['y'], equal_nan=True)
    assert not actual['y'][1, 3].any() and not actual['u'][1, 3].any() and not actual['v'][1, 3].any()
    torch.testing.assert_close(actual['u'][1].double(), expected['u'][1])
    assert actual['u'][0].isnan().all() and actual['v'][0].isnan().all()


@both_layouts
def test_the_masks_of_forward_and_backward_agree(layout):
    grad, (u, v, *args) = at_the_edge(layout)
    v = -args[2][:, None, None] * u + 1e-7 * v  # every sum cancels to its rounding
    actual = merge(grad, (u, v, *args))
    y = actual['y']
    assert (y >= 0).all() and torch.equal(y > 0, actual['u'] > 0) and torch.equal(y > 0, actual['v'] > 0)
    assert 0.1 < (y > 0).float().mean() < 0.9


@pytest.mark.parametrize('training', [True, False])
@both_kinds
def test_the_operators_are_well_formed(kind, training):
    if TRITON and not GPU:
        pytest.skip('the interpreter is not what the operators call')
    grad, args = arguments((2, 4, 4, 5), kind, training)
    grad, *args = (x.cuda() if GPU and isinstance(x, Tensor) else x for x in (grad, *args))
    saved = kernels.merge(*args)[1].nan_to_num()
    for op, given in (torch.ops.timm_awm.merge, args), (torch.ops.timm_awm.merge_backward, (grad, saved, *args)):
        torch.library.opcheck(op.default, tuple(given), test_utils='test_faketensor')
        torch.library.opcheck(op.default, tuple(given), test_utils='test_schema')


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(TRITON, reason='this is that process, or there is a GPU')
def test_triton_in_its_interpreter():
    code = (
        'import sys, pytest, torch; torch.set_num_threads(1); from timm_awm.layers.kernels import cpu, triton\n'
        'for name in triton.__all__: setattr(cpu, name, getattr(triton, name))\n'  # what the operators call
        f'sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", {__file__!r}]))')
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert 'passed' in result.stdout


@needs_triton
@pytest.mark.skipif('TRITON_INTERPRET' in os.environ, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('capability', [80, 90])
def test_triton_compiles_for_gpus_without_spills(capability, tmp_path):
    """What needs no GPU: bfloat16 maps, channels last, channels a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_awm.layers.kernels import triton as kernels

    ptxas = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'ptxas'
    maps_of = dict(
        _moments_kernel=('x',), _affine_act_kernel=('u', 'v', 'y'), _affine_act_sums_kernel=('grad', 'u', 'v'),
        _affine_act_grads_kernel=('grad', 'u', 'v', 'grad_u', 'grad_v'))
    whole = ('channels', 'pixels', 'stride_c', 'stride_p')
    constants = dict(BLOCK_C=128, BLOCK_P=16, HAS_V=True, RELU=True, stride_c=1)
    for name, of_maps in maps_of.items():
        kernel = getattr(kernels, name)
        constexprs = {k: v for k, v in constants.items() if k in kernel.arg_names}
        signature = {
            arg: 'constexpr' if arg in constexprs else 'i32' if arg in whole else '*bf16' if arg in of_maps else '*fp32'
            for arg in kernel.arg_names}
        aligned = {
            (i,): [['tt.divisibility', 16]] for i, arg in enumerate(kernel.arg_names)
            if signature[arg].startswith('*') or arg in ('channels', 'stride_p')}
        source = ASTSource(kernel, signature, constexprs, aligned)
        ptx = triton.compile(source, target=GPUTarget('cuda', capability, 32)).asm['ptx']
        assert re.search(r'ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64', ptx), f'{name}: no 128-bit loads'
        (tmp_path / 'kernel.ptx').write_text(ptx)
        architecture = re.search(r'\.target (\S+?)(?:,|\s)', ptx)[1]
        report = subprocess.run(
            [ptxas, '-v', f'--gpu-name={architecture}', tmp_path / 'kernel.ptx', '-o', os.devnull],
            capture_output=True, text=True, check=True).stderr
        assert '0 bytes spill stores, 0 bytes spill loads' in report, f'{name}: {report}'
