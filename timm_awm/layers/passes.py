"""The passes over maps that the fused merges make.

A map is (batch, channels, height, width), channels-last or contiguous; the maps of a call have one shape, dtype and
device, and are brought into the memory format of the first. Coefficients and results are (batch, channels), float32
(float64 for float64 maps). All is computed in that type, and a map is rounded once, to its own. Each map is read once
and written once. No function here knows autograd.

`cpu_kernels` and `triton_kernels` do the work.
"""
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

__all__ = ['available', 'mean', 'moments', 'moments_backward_', 'affine_act', 'affine_act_', 'affine_act_backward']

_HAS_TRITON = torch.version.cuda is not None and find_spec('triton') is not None


def available(x: Tensor) -> bool:
    """Whether there are passes for a map of this device and dtype."""
    if x.device.type == 'cpu':
        from .cpu_kernels import available
        return available(x.dtype)
    return _HAS_TRITON and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _kernels(x: Tensor) -> ModuleType:
    if x.is_cuda:
        from . import triton_kernels
        return triton_kernels
    from . import cpu_kernels
    return cpu_kernels


def _uniform(first: Tensor, *others: Optional[Tensor]) -> Tuple[Any, ...]:
    """All maps in the memory format of the first, channels-last if that is neither."""
    memory_format = torch.contiguous_format if first.is_contiguous() else torch.channels_last
    return tuple(x if x is None else x.contiguous(memory_format=memory_format) for x in (first, *others))


def mean(x: Tensor) -> Tensor:
    """Mean of every channel of every image, (batch, channels)."""
    x, = _uniform(x)
    return _kernels(x).moments(x, False)[0]


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of every image, (batch, channels)."""
    x, = _uniform(x)
    mean, var = _kernels(x).moments(x, True).unbind()
    return mean, var


def moments_backward_(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """grad + scale · x + shift, in place of grad.

    Args:
        grad: (batch, channels, height, width).
        x: In shape and dtype like grad.
        scale: (batch, channels).
        shift: Likewise.

    Returns:
        grad, or if that is laid out otherwise than x, a copy.
    """
    x, grad = _uniform(x, grad)
    _kernels(x).moments_backward_(grad, x, scale.contiguous(), shift.contiguous())
    return grad


def affine_act(
        u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> Tuple[Tensor, Tensor]:
    """y = act(a · u + (b · v + c)), and its mean over height and width.

    Args:
        u: (batch, channels, height, width).
        v: In shape and dtype like u, or None for y = act(a · u + c).
        a: (batch, channels).
        b: Likewise, None if v is.
        c: Likewise.
        relu: act is ReLU, otherwise the identity.

    Returns:
        y, in shape and dtype like u, and the mean of y before its rounding, (batch, channels).
    """
    u, v = _uniform(u, v)
    return _kernels(u).affine_act(u, v, a.contiguous(), b if b is None else b.contiguous(), c.contiguous(), relu)


def affine_act_(
        u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> Tuple[Tensor, Tensor]:
    """As `affine_act`, y in place of u where u is laid out so that it can."""
    u, v = _uniform(u, v)
    return u, _kernels(u).affine_act_(u, v, a.contiguous(), b if b is None else b.contiguous(), c.contiguous(), relu)


def affine_act_backward(
        grad: Tensor, grad_pooled: Optional[Tensor], u: Tensor, v: Optional[Tensor],
        a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool, need_u: bool, need_v: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor], Tensor, Optional[Tensor], Tensor]:
    """The gradients of affine_act with respect to u, v, a, b and c.

    Args:
        grad: Gradient of y, (batch, channels, height, width).
        grad_pooled: Gradient of the means, (batch, channels); None is 0.
        u: The arguments of affine_act, as are v, a, b, c and relu.
        need_u: The gradient of u is computed, otherwise None.
        need_v: That of v, likewise.

    Returns:
        The five, each in shape and dtype like what it is the gradient of; None for v and b if there are none.
    """
    u, v, grad = _uniform(u, v, grad)
    need_v = need_v and v is not None
    grad_u, grad_v, sums = _kernels(u).affine_act_backward(
        grad, grad_pooled if grad_pooled is None else grad_pooled.contiguous(), u, v,
        a.contiguous(), b if b is None else b.contiguous(), c.contiguous(), relu, need_u, need_v,
    )
    grad_b = None if v is None else sums[2]
    return grad_u if need_u else None, grad_v if need_v else None, sums[0], grad_b, sums[1]
