"""The kernels against their formulas in float64: in C++ on the CPU, in Triton's interpreter, on a GPU if there is one.

Triton decides when it is imported whether it interprets, and torch.compile imports it in other tests of the process. So
the interpreter has a process of its own, in which this file runs again.
"""
import copy
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from timm_awm.layers import kernels
from timm_awm.layers.kernels import formula

GPU = torch.cuda.is_available()
TRITON = 'TRITON_INTERPRET' in os.environ or GPU
NHWC, NCHW = torch.channels_last, torch.contiguous_format
SHAPES = [(3, 5, 7, 9), (1, 16, 6, 6), (2, 24, 1, 1), (2, 1, 5, 3), (2, 130, 3, 3), (1, 2048, 2, 3)]
LARGE = [(1, 16, 64, 50), (2, 3, 65, 67)]  # of many tiles and blocks
DTYPES = [torch.float32, torch.bfloat16, torch.float16 if TRITON else torch.float64]

both_layouts = pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed')


def call(name, *args):
    """A kernel's results, on the CPU, and its arguments as it left them."""
    args = copy.deepcopy(args)
    if GPU:
        args = tuple(x.cuda() if isinstance(x, Tensor) else x for x in args)
    result = getattr(kernels, name)(*args)
    return result, args


def check(actual: Tensor, expected: Tensor, magnitude: Tensor, like: Tensor):
    """Within the rounding of terms of that magnitude, and that of the dtype of like, once; laid out as like."""
    assert actual.dtype == like.dtype and actual.shape == expected.shape
    if like.ndim == 4:
        layout = NCHW if like.is_contiguous() else NHWC
        assert actual.is_contiguous(memory_format=layout)
    truncates = TRITON and not GPU  # the interpreter, to bfloat16
    unit = {torch.bfloat16: 2 ** (-7 if truncates else -8), torch.float16: 2 ** -11}.get(like.dtype, 0)
    error = (actual.cpu().double() - expected).abs()
    rounding = 1e-14 if like.dtype == torch.float64 else 1e-6
    bound = unit * expected.abs() + rounding * magnitude + (1e-7 if unit else 0)
    assert (error <= bound).all(), (error - bound).max()


def unchanged(args, expected) -> bool:
    return all(torch.equal(x.cpu(), y) for x, y in zip(args, expected, strict=True) if y is not None)


def wide(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def maps(n, shape, dtype=torch.float32, layout=NHWC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def coefficients(shape, dtype=torch.float32):
    """For maps of this dtype: a and b near 0, near 2, negative and 0, in all combinations; c at random."""
    values = torch.tensor(list(itertools.product([1.99, 0.004, -0.7, 1., 0.], repeat=2)))
    pairs = values[(torch.arange(shape[0] * shape[1]) * 7 + 1) % len(values)]
    a, b = pairs.view(*shape[:2], 2).unbind(2)
    c = torch.randn(*shape[:2], generator=torch.Generator().manual_seed(1))
    return [x.contiguous().to(torch.float64 if dtype == torch.float64 else torch.float32) for x in (a, b, c)]


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + LARGE, ids=str)
def test_moments(shape, layout):
    for dtype in DTYPES:
        x, = maps(1, shape, dtype, layout)
        like = coefficients(shape, dtype)[0]
        (mean, var), args = call('moments', x)
        expected = x.double().var((2, 3), correction=0)
        check(mean, x.double().mean((2, 3)), x.double().abs().mean((2, 3)), like)
        check(var, expected, 4 * expected, like)
        (mean, var), _ = call('moments', x, False)
        check(mean, x.double().mean((2, 3)), x.double().abs().mean((2, 3)), like)
        assert var is None and unchanged(args, [x])


@both_layouts
@pytest.mark.parametrize('shape', [(2, 5, 9, 11), LARGE[0]], ids=str)
def test_moments_of_large_means_and_outliers(shape, layout):
    x = maps(1, shape, layout=layout)[0] * 0.1 + 100
    x[:, ::2] -= 200
    (mean, var), _ = call('moments', x)
    torch.testing.assert_close(mean.cpu().double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.cpu().double(), x.double().var((2, 3), correction=0), rtol=1e-4, atol=0)
    for zeros in (slice(1), slice(1)), (slice(1), slice(None)):  # as padding may make the first pixel, or row
        x[:, :, zeros[0], zeros[1]] = 0.
        (mean, var), _ = call('moments', x)
        torch.testing.assert_close(var.cpu().double(), x.double().var((2, 3), correction=0), rtol=1e-5, atol=0)
    assert not call('moments', x * 0 + 3)[0][1].any()  # a constant map


def reference(u, v, a, b, c, relu):
    z = wide(a) * u + (wide(c) if v is None else wide(b) * v + wide(c))
    return z.relu() if relu else z


def check_affine_act(grad, u, v, a, b, c, relu):
    """Forward, in place where there is such, and backward."""
    leaves = [None if x is None else x.double().requires_grad_() for x in (u, v, a, b, c)]
    y = reference(*leaves, relu)
    actual, args = call('affine_act', u, v, a, b, c, relu)
    terms = [wide(a) * u.double(), wide(c).double()] + ([] if v is None else [wide(b) * v.double()])
    check(actual, y, sum(t.abs() for t in terms), u)
    assert unchanged(args[:5], [u, v, a, b, c])
    if v is None and (u.is_contiguous() or u.is_contiguous(memory_format=NHWC)):
        _, args = call('affine_act_', u, a, c, relu)
        assert torch.equal(args[0], actual)

    scale, shift, shift_v = c, a, b
    sums, args = call('affine_act_sums', grad, u, v, a, b, c, relu)
    maps, map_args = call('affine_act_grads', grad, u, v, a, b, c, scale, shift, shift_v, relu)
    grads = torch.autograd.grad((grad.double() * y).sum(), [x for x in leaves if x is not None])
    expected = dict(zip('uac' if v is None else 'uvabc', grads))
    g = grad.double().abs()
    check(sums[0], expected['a'], (g * u.double()).abs().sum((2, 3)), a)
    check(sums[1], expected['c'], g.sum((2, 3)), a)
    added = wide(scale) * u.double() + wide(shift)
    check(maps[0], expected['u'] + added, wide(a.abs()) * g + (wide(scale) * u).abs().double() + wide(shift.abs()), u)
    if v is None:
        assert len(sums) == 2 and maps[1] is None
    else:
        check(sums[2], expected['b'], (g * v.double()).abs().sum((2, 3)), a)
        check(maps[1], expected['v'] + wide(shift_v), wide(b.abs()) * g + wide(shift_v.abs()), u)
    assert unchanged(args[:6], [grad, u, v, a, b, c]) and unchanged(map_args[:6], [grad, u, v, a, b, c])


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + LARGE, ids=str)
def test_affine_act(shape, layout):
    for dtype in DTYPES:
        a, b, c = coefficients(shape, dtype)
        grad, u, v = maps(3, shape, dtype, layout)
        for relu in True, False:
            check_affine_act(grad, u, v, a, b, c, relu)
            check_affine_act(grad, u, None, a, None, c, relu)


@pytest.mark.parametrize('first', [NHWC, NCHW], ids=['nhwc', 'nchw'])
def test_mixed_layouts(first):
    other = NCHW if first == NHWC else NHWC
    shape = 2, 6, 5, 7
    a, b, c = coefficients(shape)
    grad, v = maps(2, shape, layout=other)
    u, = maps(1, shape, layout=first, seed=5)
    transposed = [x.t().contiguous().t() for x in (a, b, c)]
    check_affine_act(grad, u, v, *transposed, True)
    check_affine_act(torch.tensor(0.3).expand(shape), u, v, a, b, c, True)  # as a mean's gradient is
    strided = torch.zeros(*shape[:3], 2 * shape[3])[..., ::2].copy_(u)  # neither layout
    check_affine_act(grad, strided, v, a, b, c, True)
    assert torch.equal(call('moments', strided)[0][0], call('moments', u.contiguous(memory_format=NHWC))[0][0])


@both_layouts
def test_nan_and_the_edge_of_the_relu(layout):
    u, v, grad = maps(3, (2, 4, 3, 5), layout=layout)
    a, b, c = torch.ones(3, 2, 4)
    u[0, 1, 2, 3] = float('nan')
    v[1, 2, 0, 4] = float('nan')
    u[0, 3], v[0, 3], c[0, 3] = 0.5, -1.5, 1.  # y is 0
    c[1, 1] = -100  # y is 0
    y, _ = call('affine_act', u, v, a, b, c, True)
    torch.testing.assert_close(y.cpu(), reference(u, v, a, b, c, True), equal_nan=True)
    leaves = [x.clone().requires_grad_() for x in (u, v, a, b, c)]
    expected = torch.autograd.grad((reference(*leaves, True) * grad).sum(), leaves)
    (grad_u, grad_v), _ = call('affine_act_grads', grad, u, v, a, b, c, 0 * a, 0 * a, 0 * a, True)
    sums, _ = call('affine_act_sums', grad, u, v, a, b, c, True)
    results = grad_u, grad_v, sums[0], sums[2], sums[1]
    expected[0][u.isnan()] = float('nan')  # by scale · u
    torch.testing.assert_close([x.cpu() for x in results], list(expected), equal_nan=True)
    assert not grad_u[0, 3].any() and not grad_u[1, 1].any() and grad_v[0, 1, 2, 3] != 0
    mean, var = call('moments', u)[0]
    assert mean[0, 1].isnan() and var[0, 1].isnan() and mean.isnan().sum() == var.isnan().sum() == 1


@both_layouts
def test_the_masks_of_forward_and_backward_agree(layout):
    u, v = maps(2, (2, 16, 16, 16), layout=layout)
    a, b, c = coefficients(u.shape)
    a, b, c = a.abs() + 0.1, b.abs() + 0.1, c * 1e-7
    v = -wide(a) * u / wide(b) + 1e-7 * maps(1, u.shape, seed=3)[0]  # every sum cancels to its rounding
    y = call('affine_act', u, v, a, b, c, True)[0]
    grad_u = call('affine_act_grads', torch.ones_like(u), u, v, a, b, c, 0 * a, 0 * a, 0 * a, True)[0][0]
    assert (y >= 0).all() and torch.equal(y > 0, grad_u > 0) and 0.1 < (y > 0).float().mean() < 0.9


def merge_inputs(kind, training, batch, dtype=torch.float32):
    """Gradients of what `coefficients` returns, and its arguments."""
    torch.manual_seed(0)
    channels = [70, 70] if kind == 'sum' else [30, 25, 1, 14]
    mean, var, other = torch.randn(batch, 70), torch.rand(batch, 70) + 0.1, torch.randn(batch, 70)
    args = (
        mean, var if training else None, other if kind == 'sum' else None, torch.randn(9, sum(channels)) / 5,
        torch.randn(len(channels), 9), torch.randn(70), torch.randn(70),
        *((None, None) if training else (torch.randn(70), torch.rand(70) + 0.1)))
    grads = torch.randn(3 if kind == 'sum' else 2, batch, 70, dtype=dtype)
    return grads, (*(x if x is None else x.to(dtype) for x in args), 1e-5, channels)


@pytest.mark.parametrize('batch', [3, 6, 200])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', ['sum', 'concatenation'])
def test_coefficients_are_the_formula(kind, training, batch):
    """In C++ as in plain torch, whose gradients are autograd's; test_fused holds both to finite differences."""
    grads, args = merge_inputs(kind, training, batch, torch.float64)
    args[3][:2] *= 1e3  # logits that saturate the sigmoids
    for name, first in ('coefficients', ()), ('coefficients_backward', (grads, 49)):
        actual, _ = call(name, *first, *args)
        for x, y in zip(actual, getattr(formula, name)(*first, *args), strict=True):
            assert x.dtype == torch.float64 and (x.cpu() - y).abs().max() <= 1e-10 * y.abs().max()


@pytest.mark.parametrize('v', [True, False])
def test_the_operators_are_well_formed(v):
    grad, u, v = maps(3, (2, 3, 4, 5)) if v else (*maps(2, (2, 3, 4, 5)), None)
    a, b, c = coefficients(u.shape)
    b = None if v is None else b
    ops, checks = torch.ops.timm_awm, ('test_schema', 'test_faketensor')
    grads, merge = merge_inputs('concatenation' if v is None else 'sum', True, 2)
    if GPU:
        grad, u, v, a, b, c = (x if x is None else x.cuda() for x in (grad, u, v, a, b, c))
    elif TRITON:
        pytest.skip('the interpreter is not what the operators call')
    for op, args in [
            (ops.moments, (u, True)), (ops.moments, (u, False)), (ops.affine_act, (u, v, a, b, c, True)),
            (ops.affine_act_, (u, a, c, False)), (ops.affine_act_sums, (grad, u, v, a, b, c, True)),
            (ops.affine_act_grads, (grad, u, v, a, b, c, a, c, b, True)), (ops.coefficients, merge),
            (ops.coefficients_backward, (grads, 49, *merge))]:
        torch.library.opcheck(op.default, args, test_utils=checks)


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
    whole = ('images', 'channels', 'pixels', 'stride_c', 'stride_p')
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
