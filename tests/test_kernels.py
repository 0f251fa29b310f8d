"""The C++ kernels against the formula in float64."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_awm.layers import cpu
from timm_awm.layers.operands import Operands

NHWC, NCHW = torch.channels_last, torch.contiguous_format
SHAPES = [  # of few and many images, channels, pixels; of tiles and blocks that are not full
    (3, 5, 7, 9), (1, 16, 6, 6), (2, 24, 1, 1), (6, 2, 5, 3), (2, 36, 5, 7), (2, 130, 3, 3), (1, 2048, 2, 3),
    (1, 16, 64, 50), (2, 3, 65, 67), (3, 60, 33, 31), (64, 70, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TENSORS = 'u', 'v', 'weight1', 'weight2', 'gamma', 'beta'  # in the order of the gradients

both_layouts = pytest.mark.parametrize('layout', [NHWC, NCHW], ids=['nhwc', 'nchw'])
both_kinds = pytest.mark.parametrize('kind', ['sum', 'concatenation'])


def maps(n, shape, dtype=torch.float32, layout=NHWC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def operands(shape, kind='sum', training=True, relu=True, dtype=torch.float32, layout=NHWC):
    """A gradient, and what to compute from."""
    grad, u, v = maps(3, shape, dtype, layout)
    c = shape[1]
    paths = (u, v) if kind == 'sum' else [x.contiguous(memory_format=layout) for x in u.split([c - c // 2, c // 2], 1)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(1)
    weight1, weight2, gamma, beta, mean, var = (
        torch.randn(*size, generator=generator, dtype=wide)
        for size in ((9, sum(x.shape[1] for x in paths)), (2, 9), *4 * [(c,)]))
    gamma[::3], gamma[1::5] = 0.004, 0.
    running = (None, None) if training else (mean, var.square() + 0.1)
    return grad, Operands.of(kind == 'sum', 1e-5, relu, weight1 / 5, weight2, gamma, beta, *running, *paths)


def merge(grad, o):
    """The result and the gradients, by name; what is given must stay as it is."""
    given = copy.deepcopy((grad, o))
    y, saved, _ = cpu.merge(o)
    results = dict(zip(('y', *TENSORS), (y, *cpu.merge_backward(grad, saved, o)), strict=True))
    for x, y in zip((grad, *o.flat()), (given[0], *given[1].flat()), strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x.nan_to_num(77), y.nan_to_num(77))
    return results


def reference(grad, o):
    """The formulas of docs/method.md, with torch's BatchNorm, in float64: the result and the gradients."""
    u, v = o.maps if o.is_sum else (torch.cat(o.maps, dim=1), None)
    leaves = [x if x is None else x.double().requires_grad_()
              for x in (u, v, o.weight1, o.weight2, o.gamma, o.beta)]
    u, v, weight1, weight2, gamma, beta = leaves

    def norm(x):
        running = [x if x is None else x.double() for x in (o.running_mean, o.running_var)]
        return F.batch_norm(x, *running, gamma, beta, o.running_mean is None, eps=o.eps)

    def weigh(*paths):
        z = torch.cat([path.mean((2, 3)) for path in paths], dim=1)
        sigma = (F.relu(z @ weight1.T) @ weight2.T).sigmoid()
        scales = len(paths) * sigma / sigma.sum(1, keepdim=True)
        return [scales[:, i, None, None, None] * path for i, path in enumerate(paths)]

    y = sum(weigh(norm(u), v)) if o.is_sum else norm(torch.cat(weigh(*u.split(o.channels(), dim=1)), dim=1))
    y = y.relu() if o.relu else y
    grads = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], grad.double()))
    return dict(zip(('y', *TENSORS), (y.detach(), *(x if x is None else next(grads) for x in leaves))))


def check(grad, o):
    """Within the rounding of the widest terms, and once that of the maps' dtype; maps are laid out as the first."""
    u = o.maps[0]
    layout = NCHW if u.is_contiguous() or u.stride(1) != 1 else NHWC
    unit = 2 ** -8 if u.dtype == torch.bfloat16 else 0
    actual = merge(grad, o)
    for name, expected in reference(grad, o).items():
        x = actual[name]
        if expected is None and x is None:
            continue
        assert x.dtype == (u if expected.ndim == 4 else o.weight1).dtype and x.shape == expected.shape
        assert expected.ndim < 4 or x.is_contiguous(memory_format=layout)
        bound = (1e-12 if u.dtype == torch.float64 else 1e-4) * (1 + expected.abs().max())
        if expected.ndim == 4:
            bound = bound + unit * expected.abs() + (1e-7 if unit else 0)
        error = (x.double() - expected).abs()
        assert (error <= bound).all(), (name, (error - bound).max())


@both_layouts
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_merge_and_its_gradients(shape, layout):
    for dtype in DTYPES:
        for kind, training, relu in (
                ('sum', True, True), ('sum', False, False), ('concatenation', True, False),
                ('concatenation', False, True)):
            grad, o = operands(shape, kind, training, relu, dtype, layout)
            if relu:  # at its edge rounding decides
                grad = grad * (reference(grad, o._replace(relu=False))['y'].abs() > 1e-3)
            check(grad, o)


@both_layouts
@both_kinds
@pytest.mark.parametrize('shape, training', [((2, 130, 15, 15), True), ((4, 2048, 2, 2), True), ((7, 99, 8, 8), False)])
def test_several_threads(shape, training, kind, layout, request):
    """Bands of channels, where images are fewer than threads; many channels for the small layers; images in parts."""
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(3)
    check(*operands(shape, kind, training, relu=False, layout=layout))


@both_kinds
def test_saturated_sigmoids(kind):
    """σ would be 0 in float32, and the reference is not in float64."""
    grad, o = operands((4, 8, 3, 5), kind)
    o = o._replace(weight2=-40 * o.weight2.abs())
    actual, expected = merge(grad, o), reference(grad, o)
    for name in ('y', 'u'):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-3, atol=1e-3)
    assert all(x is None or x.isfinite().all() for x in actual.values())


@both_layouts
@pytest.mark.parametrize('shape', [(2, 5, 9, 11), (1, 16, 64, 50)], ids=str)
def test_statistics_of_large_means_and_outliers(shape, layout):
    _, o = operands(shape, layout=layout)

    def check_statistics(x, rtol):
        mean, var = cpu.merge(o._replace(maps=(x, o.maps[1])))[2].double()
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0), rtol=rtol, atol=0)

    x = o.maps[0] * 0.1 + 100
    x[:, ::2] -= 200
    check_statistics(x, 1e-4)
    check_statistics(x * 0 + 3, 0)  # a constant map
    for zeros in (slice(1), slice(1)), (slice(1), slice(None)):  # as padding may make the first pixel, or row
        x[:, :, zeros[0], zeros[1]] = 0.
        check_statistics(x, 1e-5)


@both_kinds
@pytest.mark.parametrize('first', [NHWC, NCHW], ids=['nhwc', 'nchw'])
def test_mixed_layouts(first, kind):
    other = NCHW if first == NHWC else NHWC
    shape = 2, 6, 5, 7
    grad, o = operands(shape, kind, layout=other)
    u, v = o.maps[0].contiguous(memory_format=first), o.maps[1]
    check(grad, o._replace(maps=(u, v), weight1=o.weight1.t().contiguous().t()))
    check(torch.tensor(0.3).expand(shape), o._replace(maps=(u, v)))  # as a mean's gradient is
    strided = torch.zeros(*u.shape[:3], 2 * shape[3])[..., ::2].copy_(u)  # neither layout
    check(grad, o._replace(maps=(strided, v)))


def at_the_edge(layout):
    """A gradient, and operands for y = relu(γ · u + v + β): W2 is zero, and BatchNorm has running statistics."""
    grad, o = operands((2, 16, 16, 16), training=False, layout=layout)
    return grad.abs() + 0.1, o._replace(
        weight2=0 * o.weight2, gamma=o.gamma.abs() + 0.1, beta=1e-7 * o.beta, running_mean=0 * o.beta,
        running_var=0 * o.beta + 1, eps=0.)


@both_layouts
def test_nan_and_the_edge_of_the_relu(layout):
    grad, o = at_the_edge(layout)
    u, v = o.maps
    u[0, 1, 2, 3] = float('nan')
    o.gamma[3], o.beta[3], u[1, 3], v[1, 3] = 2., 1., 0.5, -2.  # y is 0
    actual = merge(grad, o)
    expected = reference(grad, o)
    assert actual['y'][0].isnan().all()  # λ is
    torch.testing.assert_close(actual['y'].double(), expected['y'], equal_nan=True)
    assert not actual['y'][1, 3].any() and not actual['u'][1, 3].any() and not actual['v'][1, 3].any()
    torch.testing.assert_close(actual['u'][1].double(), expected['u'][1])
    assert actual['u'][0].isnan().all() and actual['v'][0].isnan().all()


@both_layouts
def test_the_masks_of_forward_and_backward_agree(layout):
    grad, o = at_the_edge(layout)
    u, v = o.maps
    actual = merge(grad, o._replace(maps=(u, -o.gamma[:, None, None] * u + 1e-7 * v)))  # sums cancel to their rounding
    y = actual['y']
    assert (y >= 0).all() and torch.equal(y > 0, actual['u'] > 0) and torch.equal(y > 0, actual['v'] > 0)
    assert 0.1 < (y > 0).float().mean() < 0.9
