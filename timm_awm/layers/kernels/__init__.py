"""The kernels of the fused merges. Each reads its maps once and writes its results once.

A map is (batch, channels, height, width), contiguous or channels-last; the maps of a call have one shape, dtype and
device, and are brought into the memory format of the first. Coefficients and sums are (batch, channels), float32
(float64 for float64 maps). The kernels compute in that type, and round a map once, to its own. None knows autograd.

Each kernel is an operator of `torch.library`, with an implementation in C++ (`cpu`) and one in Triton (`triton`).
"""
import importlib
from importlib.util import find_spec
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

__all__ = ['is_available', 'moments', 'affine_act', 'affine_act_', 'affine_act_backward', 'add_affine_']

_HAS_TRITON = torch.version.cuda is not None and find_spec('triton') is not None
_SCHEMAS = dict(
    moments='(Tensor x, bool with_var) -> Tensor',
    affine_act='(Tensor u, Tensor? v, Tensor a, Tensor? b, Tensor c, bool relu) -> Tensor',
    affine_act_='(Tensor(a!) u, Tensor a, Tensor c, bool relu) -> ()',
    affine_act_backward='(Tensor grad, Tensor u, Tensor? v, Tensor a, Tensor? b, Tensor c, bool relu) -> Tensor[]',
    add_affine_='(Tensor(a!) grad, Tensor x, Tensor? scale, Tensor shift) -> ()',
)


def is_available(x: Tensor) -> bool:
    """Whether there are kernels for a map of this device and dtype; warns once if they cannot be built."""
    if x.device.type == 'cpu':
        from .cpu import is_available
        return is_available(x.dtype)
    return _HAS_TRITON and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def moments(x: Tensor, with_var: bool = True) -> Tuple[Tensor, Optional[Tensor]]:
    """Mean over the pixels of each image's channels, and biased variance, None if it is not asked for."""
    x, = _uniform(x)
    mean, *var = torch.ops.timm_awm.moments(x, with_var).unbind()
    return mean, var[0] if var else None


def affine_act(
        u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> Tensor:
    """y = act(a · u + (b · v + c)).

    Args:
        u: (batch, channels, height, width).
        v: In shape and dtype like u, or None for y = act(a · u + c).
        a: (batch, channels).
        b: Likewise, None if v is.
        c: Likewise.
        relu: act is ReLU, otherwise the identity.

    Returns:
        y, in shape and dtype like u.
    """
    u, v = _uniform(u, v)
    return torch.ops.timm_awm.affine_act(u, v, *_dense(a, b, c), relu)


def affine_act_(u: Tensor, a: Tensor, c: Tensor, relu: bool) -> None:
    """u = act(a · u + c), in place. u is contiguous or channels-last."""
    torch.ops.timm_awm.affine_act_(u, *_dense(a, c), relu)


def affine_act_backward(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> Tuple[Tensor, Optional[Tensor], Tensor, Optional[Tensor], Tensor]:
    """The gradients of `affine_act` with respect to u, v, a, b and c.

    Args:
        grad: Gradient of y, (batch, channels, height, width).
        u: The arguments of affine_act, as are v, a, b, c and relu.

    Returns:
        The five, each in shape and dtype like what it is the gradient of; None for v and b if there are none.
    """
    u, v = _uniform(u, v)
    *grads, sums = torch.ops.timm_awm.affine_act_backward(grad, u, v, *_dense(a, b, c), relu)
    if v is None:
        return grads[0], None, sums[0], None, sums[1]
    return grads[0], grads[1], sums[0], sums[2], sums[1]


def add_affine_(grad: Tensor, x: Tensor, scale: Optional[Tensor], shift: Tensor) -> None:
    """grad += scale · x + shift.

    Args:
        grad: (batch, channels, height, width).
        x: In shape and dtype like grad.
        scale: (batch, channels); None for 0, which leaves x unread.
        shift: (batch, channels).
    """
    x, = _uniform(x)
    torch.ops.timm_awm.add_affine_(grad, x, *_dense(scale, shift))


def sums_like(x: Tensor, n: int) -> Tensor:
    """An empty result of n sums for each channel of each image, (n, batch, channels)."""
    return x.new_empty((n, *x.shape[:2]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def in_format_of(first: Tensor, x: Tensor) -> Tensor:
    """x in the memory format of the first map, channels-last if that is neither. Of gradients torch.compile does not
    know it, so that the implementations of the operators see to it."""
    return x.contiguous(memory_format=torch.contiguous_format if first.is_contiguous() else torch.channels_last)


def _uniform(first: Tensor, *others: Optional[Tensor]) -> Tuple[Any, ...]:
    return tuple([x if x is None else in_format_of(first, x) for x in (first, *others)])


# torch.compile stumbles over generators here
def _dense(*coefficients: Optional[Tensor]) -> Tuple[Any, ...]:
    return tuple([x if x is None else x.contiguous() for x in coefficients])


def _fake_backward(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> List[Tensor]:
    maps = [u] if v is None else [u, v]
    return [*(torch.empty_like(x) for x in maps), sums_like(u, 1 + len(maps))]


_FAKES: Dict[str, Callable[..., Any]] = dict(
    moments=lambda x, with_var: sums_like(x, 1 + with_var),
    affine_act=lambda u, v, a, b, c, relu: torch.empty_like(u),
    affine_act_=lambda u, a, c, relu: None,
    affine_act_backward=_fake_backward,
    add_affine_=lambda grad, x, scale, shift: None,
)


def _register(name: str, device: str, module: str) -> None:
    """The implementation for a device, whose module is imported when it is first called."""
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module, __name__), name)(*args)

    torch.library.impl(f'timm_awm::{name}', device, call)


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f'timm_awm::{_name}', _schema)
    torch.library.register_fake(f'timm_awm::{_name}', _FAKES[_name])
    _register(_name, 'cpu', '.cpu')
    _register(_name, 'cuda', '.triton')
