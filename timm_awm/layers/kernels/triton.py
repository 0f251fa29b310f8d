"""The merge on NVIDIA GPUs: what reads maps in Triton, the rest in plain torch. Nobody has timed it yet.

Maps are float32, bfloat16 or float16; all arithmetic is in float32. Sums are taken in a fixed order, without atomics:
they are the same in every run.

A program computes a block of channels of one image, in tiles of pixels × channels. The strides say which of the two is
contiguous, and Triton lays the threads out along it.
"""
from typing import Any, Dict, List, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import empty_results, formula, in_format_of

__all__ = ['merge', 'merge_backward']


@triton.jit
def _program(channels, pixels, BLOCK_C: tl.constexpr):
    """What is this program's: its channels, the start of its image in a map, its row in (images, channels). Channel
    blocks vary fastest: neighbours in memory, read together."""
    blocks = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(tl.int64)  # one image has less than 2^31 elements, a batch may have more
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, image * (channels * pixels), image * channels + channel


@triton.jit
def _tile(first, pixels, channel, channels, stride_c, stride_p, BLOCK_P: tl.constexpr):
    """The offsets of BLOCK_P pixels in an image, and which of them exist."""
    pixel = (first + tl.arange(0, BLOCK_P))[:, None]
    return pixel * stride_p + channel[None, :] * stride_c, (pixel < pixels) & (channel < channels)[None, :]


@triton.jit
def _row(coefficients, row, channel, channels):
    """Those of the program's channels."""
    return tl.load(coefficients + row, mask=channel < channels, other=0.)[None, :]


@triton.jit
def _affine(u, v, offset, mask, a, b, c, HAS_V: tl.constexpr):
    """A tile of u and v, and a·u + (b·v + c): forward and backward agree on its sign to the last bit."""
    u_tile = tl.load(u + offset, mask=mask, other=0.).to(tl.float32)
    v_tile = u_tile
    z = c
    if HAS_V:
        v_tile = tl.load(v + offset, mask=mask, other=0.).to(tl.float32)
        z = tl.fma(b, v_tile, c)
    return u_tile, v_tile, tl.fma(a, u_tile, z)


@triton.jit
def _moments_kernel(
        x, mean_out, var_out, channels, pixels, stride_c, stride_p,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    channel, base, row = _program(channels, pixels, BLOCK_C)
    # Welford's recurrence in every lane: neither a large mean nor an outlier spoils it, as both may a sum of squares
    count = tl.zeros([BLOCK_P, 1], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_P):
        offset, mask = _tile(first, pixels, channel, channels, stride_c, stride_p, BLOCK_P)
        value = tl.load(x + base + offset, mask=mask, other=0.).to(tl.float32)
        count += (first + tl.arange(0, BLOCK_P) < pixels)[:, None].to(tl.float32)
        delta = tl.where(mask, value - mean, 0.)
        mean += delta * (1. / tl.maximum(count, 1.))
        m2 += delta * (value - mean)
    overall = tl.sum(count * mean, axis=0) / pixels
    deviation = mean - overall[None, :]
    var = tl.sum(m2 + count * deviation * deviation, axis=0) / pixels
    tl.store(mean_out + row, overall, mask=channel < channels)
    tl.store(var_out + row, var, mask=channel < channels)


@triton.jit
def _affine_act_kernel(
        u, v, a, b, c, y, channels, pixels, stride_c, stride_p,
        HAS_V: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    channel, base, row = _program(channels, pixels, BLOCK_C)
    a_row = _row(a, row, channel, channels)
    b_row = _row(b, row, channel, channels)
    c_row = _row(c, row, channel, channels)
    for first in range(0, pixels, BLOCK_P):
        offset, mask = _tile(first, pixels, channel, channels, stride_c, stride_p, BLOCK_P)
        _, _, z = _affine(u + base, v + base, offset, mask, a_row, b_row, c_row, HAS_V)
        if RELU:
            z = tl.where(z <= 0., 0., z)  # NaN stays
        tl.store(y + base + offset, z, mask=mask)


@triton.jit
def _affine_act_sums_kernel(
        grad, u, v, a, b, c, grad_a, grad_b, grad_c, channels, pixels, stride_c, stride_p,
        HAS_V: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    channel, base, row = _program(channels, pixels, BLOCK_C)
    a_row = _row(a, row, channel, channels)
    b_row = _row(b, row, channel, channels)
    c_row = _row(c, row, channel, channels)
    sum_gu = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_gv = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_P):
        offset, mask = _tile(first, pixels, channel, channels, stride_c, stride_p, BLOCK_P)
        u_tile, v_tile, z = _affine(u + base, v + base, offset, mask, a_row, b_row, c_row, HAS_V)
        g = tl.load(grad + base + offset, mask=mask, other=0.).to(tl.float32)
        if RELU:
            g = tl.where(z <= 0., 0., g)  # NaN passes
        sum_gu += g * u_tile
        sum_g += g
        if HAS_V:
            sum_gv += g * v_tile
    tl.store(grad_a + row, tl.sum(sum_gu, axis=0), mask=channel < channels)
    tl.store(grad_c + row, tl.sum(sum_g, axis=0), mask=channel < channels)
    if HAS_V:
        tl.store(grad_b + row, tl.sum(sum_gv, axis=0), mask=channel < channels)


@triton.jit
def _affine_act_grads_kernel(
        grad, u, v, a, b, c, scale, shift, shift_v, grad_u, grad_v, channels, pixels, stride_c, stride_p,
        HAS_V: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    channel, base, row = _program(channels, pixels, BLOCK_C)
    a_row = _row(a, row, channel, channels)
    b_row = _row(b, row, channel, channels)
    c_row = _row(c, row, channel, channels)
    scale_row = _row(scale, row, channel, channels)
    shift_row = _row(shift, row, channel, channels)
    shift_v_row = _row(shift_v, row, channel, channels)
    for first in range(0, pixels, BLOCK_P):
        offset, mask = _tile(first, pixels, channel, channels, stride_c, stride_p, BLOCK_P)
        u_tile, _, z = _affine(u + base, v + base, offset, mask, a_row, b_row, c_row, HAS_V)
        g = tl.load(grad + base + offset, mask=mask, other=0.).to(tl.float32)
        if RELU:
            g = tl.where(z <= 0., 0., g)
        tl.store(grad_u + base + offset, a_row * g + (scale_row * u_tile + shift_row), mask=mask)
        if HAS_V:
            tl.store(grad_v + base + offset, b_row * g + shift_v_row, mask=mask)


_TILE = 2048  # elements: sixteen for each thread of four warps
_CONTIGUOUS = 128  # elements of a tile along the contiguous axis, 256 or 512 bytes; the rest goes along the other


def _plan(x: Tensor) -> Tuple[Tuple[int], Dict[str, Any]]:
    """The grid for maps like x, and what the kernels are told about the maps."""
    images, channels, height, width = x.shape
    pixels = height * width
    if x.is_contiguous():
        block_p = min(triton.next_power_of_2(pixels), _CONTIGUOUS)
        block_c = min(triton.next_power_of_2(channels), _TILE // block_p)
        strides = dict(stride_c=pixels, stride_p=1)
    else:
        block_c = min(triton.next_power_of_2(channels), _CONTIGUOUS)
        block_p = min(triton.next_power_of_2(pixels), _TILE // block_c)
        strides = dict(stride_c=1, stride_p=channels)
    return (images * triton.cdiv(channels, block_c),), dict(
        channels=channels, pixels=pixels, **strides, BLOCK_C=block_c, BLOCK_P=block_p)


def merge(u: Tensor, v: Any, *args: Any, overwrite: bool = False) -> List[Tensor]:
    *inputs, relu = args
    y, saved, _ = empty_results(u, overwrite)
    a, b, c, mean, var, other = saved
    grid, plan = _plan(u)
    with torch.cuda.device_of(u):  # Triton launches on the current device
        _moments_kernel[grid](u, mean, var, **plan)
        if v is not None:
            _moments_kernel[grid](v, other, torch.empty_like(var), **plan)
        coefficients, stats = formula.coefficients(mean, var, None if v is None else other, *inputs)
        for row, x in zip((a, b, c), coefficients):
            if x is not None:
                row.copy_(x)
        _affine_act_kernel[grid](u, u if v is None else v, a, b, c, y, **plan, HAS_V=v is not None, RELU=relu)
    return [y, saved, stats]


def merge_backward(grad: Tensor, saved: Tensor, u: Tensor, v: Any, *args: Any) -> List[Tensor]:
    parameters, options, relu = args[:4], args[4:-1], args[-1]
    a, b, c, mean, var, other = saved
    maps = in_format_of(u, grad), u, u if v is None else v, a, b, c
    grid, plan = _plan(u)
    plan.update(HAS_V=v is not None, RELU=relu)
    sums = torch.empty_like(saved[:3])
    grad_maps = [torch.empty_like(u) for x in (u, v) if x is not None]
    with torch.cuda.device_of(u):
        _affine_act_sums_kernel[grid](*maps, *sums, **plan)
        leaves: List[Any] = [
            x if x is None else x.detach().requires_grad_()
            for x in (mean, var, None if v is None else other, *parameters)]
        with torch.enable_grad():
            coefficients, _ = formula.coefficients(*leaves, *options)
        known = [(x, of_x) for x, of_x in zip(coefficients, sums) if x is not None]
        results: Any = iter(torch.autograd.grad(
            [x for x, _ in known], [x for x in leaves if x is not None], [of_x for _, of_x in known],
            materialize_grads=True))  # with running statistics the variance has no part
        of_leaves: List[Any] = [x if x is None else next(results) for x in leaves]
        grad_mean, grad_var, grad_other, *grads = of_leaves
        scale = grad_var * (2 / plan['pixels'])
        shift = grad_mean / plan['pixels'] - scale * mean
        shift_v = shift if grad_other is None else grad_other / plan['pixels']
        _affine_act_grads_kernel[grid](*maps, scale, shift, shift_v, grad_maps[0], grad_maps[-1], **plan)
    return [*grad_maps, *grads]
