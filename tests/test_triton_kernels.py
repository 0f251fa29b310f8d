"""The kernels against their formulas in float64: on the GPU, or in Triton's interpreter where there is none.

Whether it interprets, Triton decides once, when it is imported, and torch.compile imports it in other tests of this
process. So the interpreter has a process of its own: this file, run as a script, which answers calls on its stdin.
"""
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed')

GPU = torch.cuda.is_available()
NHWC, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5, 7, 9), (1, 16, 6, 6), (2, 24, 1, 1), (2, 1, 5, 3), (2, 130, 3, 3), (1, 2048, 2, 3)]
SPLIT = [(1, 16, 64, 50), (2, 3, 65, 67)]  # pixels are shared: the first's by 5 programs, none is left for a 6th


@pytest.fixture(scope='module')
def call():
    """Calls a function of timm_awm.layers.triton_kernels by its name: call(name, *args) -> (result, args)."""
    if GPU:
        from timm_awm.layers import triton_kernels

        def direct(name, *args):
            args = [x.cuda() if isinstance(x, Tensor) else x for x in args]
            return getattr(triton_kernels, name)(*args), args

        yield direct
        return

    def remote(name, *args):
        pickle.dump((name, args), process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        if isinstance(answer, str):
            pytest.fail(answer)
        return answer

    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'TRITON_INTERPRET': '1'}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, __file__], env=env, **pipes) as process:
        yield remote
        process.stdin.close()


def answer_calls():
    import traceback

    out = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # whatever is printed is no answer
    torch.set_num_threads(1)
    from timm_awm.layers import triton_kernels

    triton_kernels.wrap_triton = lambda kernel: kernel  # of torch 2.6, it rejects an interpreted kernel
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(triton_kernels, name)(*args), args
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, out)
        out.flush()


def wide(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def maps(n, shape, dtype=torch.float32, layout=NHWC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def coefficients(shape, seed=1):
    """a and b near 0, near 2, negative and 0, in all combinations; c, and a gradient of the mean, at random."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(list(itertools.product([1.99, 0.004, -0.7, 1., 0.], repeat=2)))
    pairs = values[(torch.arange(shape[0] * shape[1]) * 7 + 1) % len(values)]
    a, b = pairs.view(*shape[:2], 2).unbind(2)
    c, grad_pooled = torch.randn(2, *shape[:2], generator=generator)
    return a.contiguous(), b.contiguous(), c, grad_pooled


def check(actual: Tensor, expected: Tensor, magnitude: Tensor, like: Tensor):
    """Within float32's rounding of terms of that magnitude, and that of the dtype of like, once; laid out as like."""
    assert actual.dtype == like.dtype and actual.shape == expected.shape
    if like.ndim == 4:
        layout = NCHW if like.is_contiguous() or not like.is_contiguous(memory_format=NHWC) else NHWC
        assert actual.is_contiguous(memory_format=layout)
    else:
        assert actual.is_contiguous()
    # the interpreter truncates to bfloat16, a GPU rounds to nearest
    unit = {torch.float32: 0, torch.bfloat16: 2 ** (-8 if GPU else -7), torch.float16: 2 ** -11}[like.dtype]
    error = (actual.cpu().double() - expected).abs()
    bound = unit * expected.abs() + 1e-6 * magnitude + (1e-7 if unit else 0)
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('shape', SHAPES + SPLIT, ids=str)
def test_moments(call, shape, layout):
    for dtype in DTYPES:
        x, = maps(1, shape, dtype, layout)
        assert (call('_plan', x)[0][1] > 1) == (shape in SPLIT)
        (mean, var), _ = call('moments', x)
        f32 = torch.empty(0)
        expected = x.double().var((2, 3), correction=0)
        check(mean, x.double().mean((2, 3)), x.double().abs().mean((2, 3)), f32)
        check(var, expected, 4 * expected, f32)


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('shape', [(2, 5, 9, 11), SPLIT[0]], ids=str)
def test_moments_of_large_means_and_outliers(call, shape, layout):
    x = maps(1, shape, layout=layout)[0] * 0.1 + 100
    x[:, ::2] -= 200
    (mean, var), _ = call('moments', x)
    torch.testing.assert_close(mean.cpu().double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.cpu().double(), x.double().var((2, 3), correction=0), rtol=1e-4, atol=0)
    x[:, :, 0, 0] = 0.  # as padding may make the first pixel
    (mean, var), _ = call('moments', x)
    torch.testing.assert_close(var.cpu().double(), x.double().var((2, 3), correction=0), rtol=1e-5, atol=0)
    x = maps(1, shape, layout=layout)[0] * 0
    assert not call('moments', x + 3)[0][1].any()  # a constant map


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('shape', SHAPES + SPLIT, ids=str)
def test_moments_backward(call, shape, layout):
    scale, shift, *_ = coefficients(shape)
    for dtype in DTYPES:
        grad, x = maps(2, shape, dtype, layout)
        terms = [grad.double(), wide(scale) * x.double(), wide(shift).double()]
        result, args = call('moments_backward_', grad, x, scale, shift)
        check(result, sum(terms), sum(t.abs() for t in terms), grad)
        assert torch.equal(args[0], result) and torch.equal(args[1].cpu(), x)


def reference(u, v, a, b, c, relu):
    z = wide(a) * u + (wide(c) if v is None else wide(b) * v + wide(c))
    y = z.relu() if relu else z
    return y, y.mean((2, 3))


def check_affine_act(call, maps, coefficients, relu):
    """Forward and backward, all gradients asked for."""
    grad, u, v = maps
    a, b, c, grad_pooled = coefficients
    leaves = [None if x is None else x.double().requires_grad_() for x in (u, v, a, b, c)]
    y, pooled = reference(*leaves, relu)
    (actual, actual_pooled), _ = call('affine_act', u, v, a, b, c, relu)
    terms = [wide(a) * u.double(), wide(c).double()] + ([] if v is None else [wide(b) * v.double()])
    magnitude = sum(t.abs() for t in terms)
    check(actual, y, magnitude, u)
    check(actual_pooled, pooled, 4 * magnitude.mean((2, 3)), a)

    results, _ = call('affine_act_backward', grad, grad_pooled, u, v, a, b, c, relu, True, True)
    loss = 0 if grad is None else (grad.double() * y).sum()
    loss = loss + (0 if grad_pooled is None else (grad_pooled.double() * pooled).sum())
    expected = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    if v is None:
        assert results[1] is None and results[3] is None
    g = torch.zeros_like(y) if grad is None else grad.double().abs()
    g = g + (0 if grad_pooled is None else wide(grad_pooled.abs()) / u[0, 0].numel())
    magnitudes = [wide(a.abs()) * g, (g * u.double()).abs().sum((2, 3)), g.sum((2, 3))]
    likes = [u, a, a]
    if v is not None:
        magnitudes[1:1], likes[1:1] = [wide(b.abs()) * g], [u]
        magnitudes[3:3], likes[3:3] = [(g * v.double()).abs().sum((2, 3))], [a]
    for item in zip([x for x in results if x is not None], expected, magnitudes, likes, strict=True):
        check(*item)


@pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
@pytest.mark.parametrize('shape', SHAPES + SPLIT, ids=str)
def test_affine_act(call, shape, layout):
    a, b, c, grad_pooled = coefficients(shape)
    for dtype in DTYPES if shape in SHAPES else DTYPES[:2]:
        grad, u, v = maps(3, shape, dtype, layout)
        for relu in True, False:
            check_affine_act(call, (grad, u, v), (a, b, c, grad_pooled), relu)
            check_affine_act(call, (grad, u, None), (a, None, c, grad_pooled), relu)


@pytest.mark.parametrize('has_v', [True, False])
@pytest.mark.parametrize('relu', [True, False])
def test_gradients_that_are_none_or_not_needed(call, relu, has_v):
    grad, u, v = maps(3, (2, 5, 4, 3))
    a, b, c, grad_pooled = coefficients(u.shape)
    v, b = (v, b) if has_v else (None, None)
    check_affine_act(call, (None, u, v), (a, b, c, grad_pooled), relu)
    check_affine_act(call, (grad, u, v), (a, b, c, None), relu)
    nothing, _ = call('affine_act_backward', None, None, u, v, a, b, c, relu, True, True)
    assert not any(x.any() for x in nothing if x is not None)

    args = grad, grad_pooled, u, v, a, b, c, relu
    whole, _ = call('affine_act_backward', *args, True, True)
    for need_u, need_v in (True, False), (False, True), (False, False):
        some, _ = call('affine_act_backward', *args, need_u, need_v)
        needed = need_u, need_v and has_v, True, has_v, True
        for x, y, need in zip(some, whole, needed):
            assert torch.equal(x, y) if need else x is None


@pytest.mark.parametrize('first', [NHWC, NCHW], ids=['nhwc', 'nchw'])
def test_mixed_layouts(call, first):
    other = NCHW if first == NHWC else NHWC
    shape = 2, 6, 5, 7
    a, b, c, grad_pooled = coefficients(shape)
    grad, v = maps(2, shape, layout=other)
    u, = maps(1, shape, layout=first, seed=5)
    check_affine_act(call, (grad, u, v), (a, b, c, grad_pooled), True)
    expanded = torch.tensor(0.3).expand(shape), torch.tensor(0.7).expand(shape[:2])  # as a mean's gradient is
    check_affine_act(call, (expanded[0], u, v), (a.t().contiguous().t(), b, c, expanded[1]), True)
    (mean, _), _ = call('moments', u[:, :, ::2, 1:])  # neither layout
    check(mean, u[:, :, ::2, 1:].double().mean((2, 3)), torch.tensor(1.), a)

    terms = u.double(), wide(a) * v.double(), wide(b).double()
    result, args = call('moments_backward_', u, v, a, b)
    check(result, sum(terms), sum(t.abs() for t in terms), u)
    assert torch.equal(args[0], result)
    strided = torch.zeros(*shape[:3], 2 * shape[3])[..., ::2].copy_(u)
    result, args = call('moments_backward_', strided, v, a, b)
    assert torch.equal(args[0], result)  # in place all the same
    torch.testing.assert_close(result.cpu().double(), sum(terms))


def test_nan_and_the_edge_of_the_relu(call):
    u, v, grad = maps(3, (2, 4, 3, 5))
    a, b, c, grad_pooled = torch.ones(4, 2, 4)
    u[0, 1, 2, 3] = float('nan')
    v[1, 2, 0, 4] = float('nan')
    u[0, 3], v[0, 3], c[0, 3] = 0.5, -1.5, 1.  # y is 0
    c[1, 1] = -100  # y is 0
    y, pooled = call('affine_act', u, v, a, b, c, True)[0]
    torch.testing.assert_close((y.cpu(), pooled.cpu()), reference(u, v, a, b, c, True), equal_nan=True)
    assert y.isnan().sum() == 2 and pooled.isnan().sum() == 2

    leaves = [x.clone().requires_grad_() for x in (u, v, a, b, c)]
    y, pooled = reference(*leaves, True)
    expected = torch.autograd.grad((y * grad).sum() + (pooled * grad_pooled).sum(), leaves)
    results, _ = call('affine_act_backward', grad, grad_pooled, u, v, a, b, c, True, True, True)
    torch.testing.assert_close([x.cpu() for x in results], list(expected), equal_nan=True)
    assert not results[0][0, 3].any() and not results[0][1, 1].any() and results[0][0, 1, 2, 3] != 0
    mean, var = call('moments', u)[0]
    assert mean[0, 1].isnan() and var[0, 1].isnan() and mean.isnan().sum() == var.isnan().sum() == 1


def test_the_masks_of_forward_and_backward_agree(call):
    u, v = maps(2, (2, 16, 16, 16))
    a, b, c, _ = coefficients(u.shape)
    a, b = a.abs() + 0.1, b.abs() + 0.1
    c = c * 1e-7
    v = -wide(a) * u / wide(b) + 1e-7 * maps(1, u.shape, seed=3)[0]  # every sum cancels to its rounding
    y = call('affine_act', u, v, a, b, c, True)[0][0]
    grad_u = call('affine_act_backward', torch.ones_like(u), None, u, v, a, b, c, True, True, True)[0][0]
    assert torch.equal(y > 0, grad_u > 0) and 0.1 < (y > 0).float().mean() < 0.9


def test_triton_and_torch_compile_accept_the_kernels():
    """The interpreter takes more than Triton's compiler does; this needs no GPU either, it only traces."""
    code = 'import test_triton_kernels; test_triton_kernels.trace()'
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])}
    env.pop('TRITON_INTERPRET', None)
    result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def trace():
    import triton
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget

    from timm_awm.layers import triton_kernels as kernels

    class Driver:
        def get_current_target(self):
            return GPUTarget('cuda', 80, 32)

    if not GPU:
        triton.runtime.driver.set_active(Driver())

    class Traced(Exception):
        pass

    def compiler(module, _):
        raise Traced([n.kwargs['tensors_to_clone'] for n in module.graph.nodes if 'triton_kernel' in str(n.target)])

    def f(grad, u, v, a, b, c):
        mean, var = kernels.moments(u)
        y, pooled = kernels.affine_act(u, v, a, b, c, True)
        grads = kernels.affine_act_backward(grad, pooled, u, v, a, b, c, True, True, True)
        single = kernels.affine_act_backward(None, pooled, u, None, a, None, c, True, True, True)
        return kernels.moments_backward_(2 * y, u, mean, var), grads, single[0]

    # what a kernel writes is found in what Triton's frontend makes of it; were that to fail, it would be every map
    written = [['y', 'pooled'], ['grad_u', 'grad_v', 'sums'], ['grad_u', 'sums'], ['grad']]
    for shape, layout, dynamic in itertools.product([(4, 64, 56, 56), (3, 5, 7, 9)], [NHWC, NCHW], [True, False]):
        compiled = torch.compile(f, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=dynamic)
        with pytest.raises(Exception) as error:
            compiled(*maps(3, shape, torch.bfloat16, layout), *coefficients(shape)[:3])
        splits = kernels._plan(torch.empty(shape).to(memory_format=layout))[1]
        assert str([['out']] * (1 if splits == 1 else 2) + written) in str(error.value)


if __name__ == '__main__':
    answer_calls()
