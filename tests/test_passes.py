"""The passes over maps against their formulas in float64: in C++ on the CPU; in Triton on the GPU, or its interpreter.

Whether it interprets, Triton decides once, when it is imported, and torch.compile imports it in other tests of this
process. So the interpreter has a process of its own: this file, run as a script, which answers calls on its stdin.
"""
import copy
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from timm_awm.layers import cpu_kernels, passes

GPU = torch.cuda.is_available()
NHWC, NCHW = torch.channels_last, torch.contiguous_format
SHAPES = [(3, 5, 7, 9), (1, 16, 6, 6), (2, 24, 1, 1), (2, 1, 5, 3), (2, 130, 3, 3), (1, 2048, 2, 3)]
# in Triton, pixels are shared: the first's by 5 programs, none is left for a 6th
SPLIT = [(1, 16, 64, 50), (2, 3, 65, 67)]

needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed')
both_layouts = pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])


class Call:
    """Calls a function of timm_awm.layers.passes by its name: call(name, *args) -> (result, args, as it left them)."""

    def __init__(self, backend, function):
        self.backend, self.function = backend, function
        self.dtypes = [torch.float32, torch.bfloat16, torch.float64 if backend == 'cpu' else torch.float16]

    def __call__(self, name, *args):
        return self.function(name, *args)

    def check(self, actual: Tensor, expected: Tensor, magnitude: Tensor, like: Tensor):
        """Within the rounding of terms of that magnitude, and that of the dtype of like, once; laid out as like."""
        assert actual.dtype == like.dtype and actual.shape == expected.shape
        if like.ndim == 4:
            layout = NCHW if like.is_contiguous() or not like.is_contiguous(memory_format=NHWC) else NHWC
            assert actual.is_contiguous(memory_format=layout)
        else:
            assert actual.is_contiguous()
        truncates = self.backend == 'triton' and not GPU  # the interpreter, to bfloat16
        unit = {torch.bfloat16: 2 ** (-7 if truncates else -8), torch.float16: 2 ** -11}.get(like.dtype, 0)
        error = (actual.cpu().double() - expected).abs()
        rounding = 1e-14 if like.dtype == torch.float64 else 1e-6
        bound = unit * expected.abs() + rounding * magnitude + (1e-7 if unit else 0)
        assert (error <= bound).all(), (error - bound).max()


@pytest.fixture(scope='module', params=['cpu', pytest.param('triton', marks=needs_triton)])
def call(request):
    if request.param == 'cpu' or GPU:
        def direct(name, *args):
            args = copy.deepcopy(args)
            if request.param == 'triton':
                args = tuple(x.cuda() if isinstance(x, Tensor) else x for x in args)
            return getattr(passes, name)(*args), args

        yield Call(request.param, direct)
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
        yield Call('triton', remote)
        process.stdin.close()


def answer_calls():
    import traceback

    out = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # whatever is printed is no answer
    torch.set_num_threads(1)
    from timm_awm.layers import triton_kernels

    passes._kernels = lambda x: triton_kernels
    triton_kernels.wrap_triton = lambda kernel: kernel  # of torch 2.6, it rejects an interpreted kernel
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(passes, name)(*args), args
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, out)
        out.flush()


def wide(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def maps(n, shape, dtype=torch.float32, layout=NHWC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def coefficients(shape, dtype=torch.float32, seed=1):
    """For maps of this dtype: a and b near 0, near 2, negative and 0, in all combinations; c, and a gradient of the
    mean, at random."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(list(itertools.product([1.99, 0.004, -0.7, 1., 0.], repeat=2)))
    pairs = values[(torch.arange(shape[0] * shape[1]) * 7 + 1) % len(values)]
    a, b = pairs.view(*shape[:2], 2).unbind(2)
    c, grad_pooled = torch.randn(2, *shape[:2], generator=generator)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.contiguous().to(dtype) for x in (a, b, c, grad_pooled)]


def same(args, expected):
    """Whether these arguments were left as they were."""
    return all(torch.equal(x.cpu(), y) for x, y in zip(args, expected, strict=True) if y is not None)


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + SPLIT, ids=str)
def test_moments(call, shape, layout):
    for dtype in call.dtypes:
        x, = maps(1, shape, dtype, layout)
        sums = coefficients(shape, dtype)[0]
        (mean, var), args = call('moments', x)
        expected = x.double().var((2, 3), correction=0)
        call.check(mean, x.double().mean((2, 3)), x.double().abs().mean((2, 3)), sums)
        call.check(var, expected, 4 * expected, sums)
        mean, _ = call('mean', x)
        call.check(mean, x.double().mean((2, 3)), x.double().abs().mean((2, 3)), sums)
        assert same(args, [x])


@both_layouts
@pytest.mark.parametrize('shape', [(2, 5, 9, 11), SPLIT[0]], ids=str)
def test_moments_of_large_means_and_outliers(call, shape, layout):
    x = maps(1, shape, layout=layout)[0] * 0.1 + 100
    x[:, ::2] -= 200
    (mean, var), _ = call('moments', x)
    torch.testing.assert_close(mean.cpu().double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(call('mean', x)[0].cpu().double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.cpu().double(), x.double().var((2, 3), correction=0), rtol=1e-4, atol=0)
    for zeros in (slice(1), slice(1)), (slice(1), slice(None)):  # as padding may make the first pixel, or row
        x[:, :, zeros[0], zeros[1]] = 0.
        (mean, var), _ = call('moments', x)
        torch.testing.assert_close(var.cpu().double(), x.double().var((2, 3), correction=0), rtol=1e-5, atol=0)
    x = maps(1, shape, layout=layout)[0] * 0
    assert not call('moments', x + 3)[0][1].any()  # a constant map


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + SPLIT, ids=str)
def test_moments_backward(call, shape, layout):
    for dtype in call.dtypes:
        scale, shift, *_ = coefficients(shape, dtype)
        grad, x = maps(2, shape, dtype, layout)
        terms = [grad.double(), wide(scale) * x.double(), wide(shift).double()]
        result, args = call('moments_backward_', grad, x, scale, shift)
        call.check(result, sum(terms), sum(t.abs() for t in terms), grad)
        assert result is args[0] and same(args[1:], [x, scale, shift])


def reference(u, v, a, b, c, relu):
    z = wide(a) * u + (wide(c) if v is None else wide(b) * v + wide(c))
    y = z.relu() if relu else z
    return y, y.mean((2, 3))


def check_affine_act(call, maps, coefficients, relu):
    """Forward, also in place, and backward, all gradients asked for."""
    grad, u, v = maps
    a, b, c, grad_pooled = coefficients
    leaves = [None if x is None else x.double().requires_grad_() for x in (u, v, a, b, c)]
    y, pooled = reference(*leaves, relu)
    (actual, actual_pooled), args = call('affine_act', u, v, a, b, c, relu)
    terms = [wide(a) * u.double(), wide(c).double()] + ([] if v is None else [wide(b) * v.double()])
    magnitude = sum(t.abs() for t in terms)
    call.check(actual, y, magnitude, u)
    call.check(actual_pooled, pooled, 4 * magnitude.mean((2, 3)), a)
    assert same(args[:5], [u, v, a, b, c])
    (y_, pooled_), args = call('affine_act_', u, v, a, b, c, relu)
    assert y_ is args[0] and torch.equal(y_, actual) and torch.equal(pooled_, actual_pooled)
    assert same(args[1:5], [v, a, b, c])

    results, args = call('affine_act_backward', grad, grad_pooled, u, v, a, b, c, relu, True, True)
    loss = (grad.double() * y).sum() + (0 if grad_pooled is None else (grad_pooled.double() * pooled).sum())
    expected = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    if v is None:
        assert results[1] is None and results[3] is None
    g = grad.double().abs() + (0 if grad_pooled is None else wide(grad_pooled.abs()) / u[0, 0].numel())
    magnitudes = [wide(a.abs()) * g, (g * u.double()).abs().sum((2, 3)), g.sum((2, 3))]
    likes = [u, a, a]
    if v is not None:
        magnitudes[1:1], likes[1:1] = [wide(b.abs()) * g], [u]
        magnitudes[3:3], likes[3:3] = [(g * v.double()).abs().sum((2, 3))], [a]
    for item in zip([x for x in results if x is not None], expected, magnitudes, likes, strict=True):
        call.check(*item)
    assert same(args[:7], [grad, grad_pooled, u, v, a, b, c])


@both_layouts
@pytest.mark.parametrize('shape', SHAPES + SPLIT, ids=str)
def test_affine_act(call, shape, layout):
    for dtype in call.dtypes if call.backend == 'cpu' or shape in SHAPES else call.dtypes[:2]:
        a, b, c, grad_pooled = coefficients(shape, dtype)
        grad, u, v = maps(3, shape, dtype, layout)
        for relu in True, False:
            check_affine_act(call, (grad, u, v), (a, b, c, grad_pooled), relu)
            check_affine_act(call, (grad, u, None), (a, None, c, grad_pooled), relu)


@both_layouts
@pytest.mark.parametrize('has_v', [True, False])
@pytest.mark.parametrize('relu', [True, False])
def test_gradients_that_are_none_or_not_needed(call, relu, has_v, layout):
    grad, u, v = maps(3, (2, 5, 4, 3), layout=layout)
    a, b, c, grad_pooled = coefficients(u.shape)
    v, b = (v, b) if has_v else (None, None)
    check_affine_act(call, (grad, u, v), (a, b, c, None), relu)
    nothing, _ = call('affine_act_backward', 0 * grad, None, u, v, a, b, c, relu, True, True)
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
    transposed = [x.t().contiguous().t() for x in (a, b, c)]
    results = [
        call('affine_act_backward', expanded[0], expanded[1], u, v, *transposed, True, True, True)[0],
        call('affine_act', u, v, *transposed, True)[0],
    ]
    args = expanded[0].contiguous(), expanded[1].contiguous(), u, v
    expected = [
        call('affine_act_backward', *args, a, b, c, True, True, True)[0], call('affine_act', u, v, a, b, c, True)[0]]
    assert all(map(torch.equal, itertools.chain(*results), itertools.chain(*expected)))

    strided = torch.zeros(*shape[:3], 2 * shape[3])[..., ::2].copy_(u)  # neither layout
    last = u.contiguous(memory_format=NHWC)
    for name in 'mean', 'moments':
        for x, y in zip(call(name, strided)[0], call(name, last)[0]):
            assert torch.equal(x, y)
    (y, pooled), args = call('affine_act_', strided, v, a, b, c, True)
    (expected, expected_pooled), _ = call('affine_act', last, v, a, b, c, True)
    assert torch.equal(y, expected) and torch.equal(pooled, expected_pooled)
    assert y.is_contiguous(memory_format=NHWC) and torch.equal(args[0].cpu(), strided)  # not in place

    terms = u.double(), wide(a) * v.double(), wide(b).double()
    for grad in u, strided:
        result, args = call('moments_backward_', grad, v, a, b)
        call.check(result, sum(terms), sum(t.abs() for t in terms), v)
        assert same(args[:2], [grad, v])  # not in place


@both_layouts
def test_nan_and_the_edge_of_the_relu(call, layout):
    u, v, grad = maps(3, (2, 4, 3, 5), layout=layout)
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
    torch.testing.assert_close(call('mean', u)[0], mean, equal_nan=True)
    assert mean[0, 1].isnan() and var[0, 1].isnan() and mean.isnan().sum() == var.isnan().sum() == 1


@both_layouts
def test_the_masks_of_forward_and_backward_agree(call, layout):
    u, v = maps(2, (2, 16, 16, 16), layout=layout)
    a, b, c, _ = coefficients(u.shape)
    a, b = a.abs() + 0.1, b.abs() + 0.1
    c = c * 1e-7
    v = -wide(a) * u / wide(b) + 1e-7 * maps(1, u.shape, seed=3)[0]  # every sum cancels to its rounding
    y = call('affine_act', u, v, a, b, c, True)[0][0]
    grad_u = call('affine_act_backward', torch.ones_like(u), None, u, v, a, b, c, True, True, True)[0][0]
    assert (y >= 0).all() and torch.equal(y > 0, grad_u > 0) and 0.1 < (y > 0).float().mean() < 0.9


def all_passes(grad, u, v, a, b, c):
    """What each of the passes makes of these; needs no result of theirs to be exact."""
    y, pooled = passes.affine_act(u, v, a, b, c, True)
    y_, pooled_ = passes.affine_act_(2 * u, None, a, None, c, False)
    grads = passes.affine_act_backward(grad, pooled, u, v, a, b, c, True, True, True)
    single = passes.affine_act_backward(grad, None, u, None, a, None, c, False, False, True)
    mean = passes.mean(v)
    moments = passes.moments(v)
    return [y, pooled, y_, pooled_, *grads, *single, mean, *moments, passes.moments_backward_(2 * y, v, mean, b)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both_layouts
@pytest.mark.parametrize('shape', [(1, 130, 3, 3), (1, 130, 16, 16), (3, 130, 16, 16), (1, 64, 32, 32)], ids=str)
def test_cpu_threads_make_no_difference(threads, shape, layout):
    """More than there are images take bands of 64 channels, the last may be narrower; small maps get one thread."""
    for dtype in torch.float32, torch.bfloat16, torch.float64:
        args = *maps(3, shape, dtype, layout), *coefficients(shape, dtype)[:3]
        results = []
        for n in 1, 2, 5:
            threads(n)
            results.append(all_passes(*args))
        for result in results[1:]:
            assert all(x is y is None or torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


def test_cpu_rounds_to_nearest_even():
    """All bfloat16, infinities and NaNs among them, with what lies between them: both halves, ties, next to both."""
    high = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32)
    low = torch.tensor([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff], dtype=torch.int32)
    value = (high * 2 ** 16 + low[:, None]).view(torch.float32)
    one = torch.ones_like(value)
    zeros = torch.zeros((*value.shape, 1, 2), dtype=torch.bfloat16)
    for layout in NHWC, NCHW:
        zero = zeros.contiguous(memory_format=layout)
        results = [
            passes.affine_act(zero, None, one, None, value, False)[0],
            passes.moments_backward_(zero.clone(), zero, one, value),
            passes.affine_act_backward(zero + 1, None, zero, zero, value, one, one, False, True, False)[0],
            passes.affine_act_backward(zero + 1, None, zero, zero, one, value, one, False, False, True)[1],
        ]
        expected = wide(value).to(torch.bfloat16).expand_as(zero)
        assert expected.isinf().sum() > 4 and expected.isnan().sum() > 100
        for result in results:
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_cpu_types(monkeypatch):
    def is_available(dtype):
        return passes.available(torch.empty(0, dtype=dtype))

    assert all(map(is_available, [torch.float32, torch.bfloat16, torch.float64]))
    assert not any(map(is_available, [torch.float16, torch.int32, torch.complex64]))

    def fail():
        raise OSError('no compiler')

    from torch._inductor.codecache import CppCodeCache
    monkeypatch.setattr(CppCodeCache, 'load', lambda source: fail())
    cpu_kernels._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match='OSError: no compiler') as warned:
            assert not is_available(torch.float32) and not is_available(torch.bfloat16)
        assert len(warned) == 1
    finally:
        cpu_kernels._library.cache_clear()


@both_layouts
@pytest.mark.parametrize('dynamic', [True, False])
def test_torch_compile_calls_the_cpu_ops(layout, dynamic):
    targets = []

    def compiler(module, _):  # as backend='aot_eager'
        targets.extend([str(node.target), *map(str, node.args[:1])] for node in module.graph.nodes)
        return module

    torch.compiler.reset()
    compiled = torch.compile(
        all_passes, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=dynamic)
    for dtype in torch.bfloat16, torch.float64:
        args = *maps(3, (2, 5, 7, 9), dtype, layout), *coefficients((2, 5), dtype)[:3]
        targets.clear()
        result = compiled(*args)
        expected = all_passes(*args)
        for x, y in zip(result, expected, strict=True):
            assert x is y is None or torch.equal(x, y) and x.stride() == y.stride()
        for name, n in dict(moments=2, moments_backward_=1, affine_act=1, affine_act_=1, affine_act_backward=2).items():
            assert sum(f'timm_awm.cpu_{name}.default' in target for target in targets) == n, name
    torch.compiler.reset()


@both_layouts
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cpu_ops_are_as_torch_compile_thinks(dtype, layout):
    """Which arguments they change; and shapes, strides and types of their results."""
    grad, u, v = maps(3, (2, 5, 7, 9), dtype, layout)
    a, b, c, grad_pooled = coefficients(u.shape, dtype)
    ops = torch.ops.timm_awm
    calls = [
        (ops.cpu_moments, (u, True)), (ops.cpu_moments, (u, False)), (ops.cpu_moments_backward_, (grad, u, a, b)),
        *((op, args) for op in (ops.cpu_affine_act, ops.cpu_affine_act_)
          for args in [(u, v, a, b, c, True), (u, None, a, None, c, False)]),
        (ops.cpu_affine_act_backward, (grad, grad_pooled, u, v, a, b, c, True, True, True)),
        (ops.cpu_affine_act_backward, (grad, None, u, v, a, b, c, True, False, True)),
        (ops.cpu_affine_act_backward, (grad, grad_pooled, u, None, a, None, c, True, True, False)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=('test_schema', 'test_faketensor'))


@needs_triton
def test_triton_and_torch_compile_accept_the_kernels():
    """The interpreter takes more than Triton's compiler does; this needs no GPU either, it only traces."""
    code = 'import test_passes; test_passes.trace()'
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])}
    env.pop('TRITON_INTERPRET', None)
    result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def trace():
    import triton
    from triton.backends.compiler import GPUTarget

    from timm_awm.layers import triton_kernels

    passes._kernels = lambda x: triton_kernels

    class Driver:
        def get_current_target(self):
            return GPUTarget('cuda', 80, 32)

    if not GPU:
        triton.runtime.driver.set_active(Driver())

    class Traced(Exception):
        pass

    def compiler(module, _):
        raise Traced([n.kwargs['tensors_to_clone'] for n in module.graph.nodes if 'triton_kernel' in str(n.target)])

    # what a kernel writes is found in what Triton's frontend makes of it; were that to fail, it would be every map
    written = [['y', 'pooled'], ['y', 'pooled'], ['grad_u', 'grad_v', 'sums'], ['sums']]
    shapes = (4, 64, 56, 56), (3, 5, 7, 9)
    for shape, (layout, dynamic) in itertools.product(shapes, [(NHWC, True), (NCHW, False)]):
        compiled = torch.compile(
            all_passes, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=dynamic)
        with pytest.raises(Exception) as error:
            compiled(*maps(3, shape, torch.bfloat16, layout), *coefficients(shape)[:3])
        splits = triton_kernels._plan(torch.empty(shape).to(memory_format=layout))[1]
        moments = [['out']] * (1 if splits == 1 else 2)
        assert str(written + moments + moments + [['grad']]) in str(error.value)


if __name__ == '__main__':
    answer_calls()
