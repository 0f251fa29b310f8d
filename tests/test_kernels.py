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


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + LARGE, ids=str)
def test_add_affine(shape, layout):
    for dtype in DTYPES:
        scale, shift, _ = coefficients(shape, dtype)
        grad, x = maps(2, shape, dtype, layout)
        terms = [grad.double(), wide(scale) * x.double(), wide(shift).double()]
        _, args = call('add_affine_', grad, x, scale, shift)
        check(args[0], sum(terms), sum(t.abs() for t in terms), grad)
        assert unchanged(args[1:], [x, scale, shift])
        _, args = call('add_affine_', grad, x, None, shift)
        check(args[0], terms[0] + terms[2], terms[0].abs() + terms[2].abs(), grad)


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

    results, args = call('affine_act_backward', grad, u, v, a, b, c, relu)
    expected = torch.autograd.grad((grad.double() * y).sum(), [x for x in leaves if x is not None])
    g = grad.double().abs()
    magnitudes = [wide(a.abs()) * g, (g * u.double()).abs().sum((2, 3)), g.sum((2, 3))]
    likes = [u, a, a]
    if v is None:
        assert results[1] is None and results[3] is None
    else:
        magnitudes[1:1], likes[1:1] = [wide(b.abs()) * g], [u]
        magnitudes[3:3], likes[3:3] = [(g * v.double()).abs().sum((2, 3))], [a]
    for item in zip([x for x in results if x is not None], expected, magnitudes, likes, strict=True):
        check(*item)
    assert unchanged(args[:6], [grad, u, v, a, b, c])


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
    terms = u.double(), wide(a) * v.double(), wide(b).double()
    for target in u, strided:
        _, args = call('add_affine_', target, v, a, b)
        torch.testing.assert_close(args[0].cpu().double(), sum(terms), rtol=1e-5, atol=1e-5)


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
    results, _ = call('affine_act_backward', grad, u, v, a, b, c, True)
    torch.testing.assert_close([x.cpu() for x in results], list(expected), equal_nan=True)
    assert not results[0][0, 3].any() and not results[0][1, 1].any() and results[0][0, 1, 2, 3] != 0
    mean, var = call('moments', u)[0]
    assert mean[0, 1].isnan() and var[0, 1].isnan() and mean.isnan().sum() == var.isnan().sum() == 1


@both_layouts
def test_the_masks_of_forward_and_backward_agree(layout):
    u, v = maps(2, (2, 16, 16, 16), layout=layout)
    a, b, c = coefficients(u.shape)
    a, b, c = a.abs() + 0.1, b.abs() + 0.1, c * 1e-7
    v = -wide(a) * u / wide(b) + 1e-7 * maps(1, u.shape, seed=3)[0]  # every sum cancels to its rounding
    y = call('affine_act', u, v, a, b, c, True)[0]
    grad_u = call('affine_act_backward', torch.ones_like(u), u, v, a, b, c, True)[0][0]
    assert (y >= 0).all() and torch.equal(y > 0, grad_u > 0) and 0.1 < (y > 0).float().mean() < 0.9


@pytest.mark.parametrize('v', [True, False])
def test_the_operators_are_well_formed(v):
    grad, u, v = maps(3, (2, 3, 4, 5)) if v else (*maps(2, (2, 3, 4, 5)), None)
    a, b, c = coefficients(u.shape)
    b = None if v is None else b
    ops, checks = torch.ops.timm_awm, ('test_schema', 'test_faketensor')
    if GPU:
        grad, u, v, a, b, c = (x if x is None else x.cuda() for x in (grad, u, v, a, b, c))
    elif TRITON:
        pytest.skip('the interpreter is not what the operators call')
    for op, args in [
            (ops.moments, (u, True)), (ops.moments, (u, False)), (ops.affine_act, (u, v, a, b, c, True)),
            (ops.affine_act_, (u, a, c, False)), (ops.affine_act_backward, (grad, u, v, a, b, c, True)),
            (ops.add_affine_, (grad, u, a, c))]:
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
        _moments_kernel=('x',), _add_affine_kernel=('grad', 'x'), _affine_act_kernel=('u', 'v', 'y'),
        _affine_act_backward_kernel=('grad', 'u', 'v', 'grad_u', 'grad_v'))
    whole = ('images', 'channels', 'pixels', 'stride_c', 'stride_p')
    constants = dict(BLOCK_C=128, BLOCK_P=16, HAS_V=True, RELU=True, SCALED=True, stride_c=1)
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
