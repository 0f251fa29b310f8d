"""The fused merge, forward and backward, as two operators of `torch.library`: in C++ (`cpu`) and in Triton (`triton`).

A map is (batch, channels, height, width), contiguous or channels-last. What is computed of its channels is float32
(float64 for float64 maps), and a map is rounded once, to its own dtype. The operators take no part in autograd.
"""
import importlib
from importlib.util import find_spec
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..mixing import wide_dtype

__all__ = ['is_available', 'merge', 'merge_backward']

_HAS_TRITON = torch.version.cuda is not None and find_spec('triton') is not None
_ARGS = (
    'Tensor u, Tensor? v, Tensor weight1, Tensor weight2, Tensor gamma, Tensor beta, Tensor? running_mean, '
    'Tensor? running_var, float eps, int[] channels, bool relu')


def is_available(x: Tensor) -> bool:
    """Whether there are kernels for a map of this device and dtype; logs once if they cannot be built."""
    if x.device.type == 'cpu':
        from .cpu import is_available
        return is_available(x.dtype)
    return _HAS_TRITON and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def merge(
        u: Tensor, v: Optional[Tensor], weight1: Tensor, weight2: Tensor, gamma: Tensor, beta: Tensor,
        running_mean: Optional[Tensor], running_var: Optional[Tensor], eps: float, channels: Sequence[int], relu: bool,
        *, overwrite: bool = False,
) -> List[Tensor]:
    """act(a · u + b · v + c), the coefficients a, b and c inferred from both maps.

    A sum normalises u and merges it with v. A concatenation merges the maps that u holds and normalises the result.

    Args:
        u: A map.
        v: A map of its shape, dtype and device; None in a concatenation.
        weight1: W1, (hidden, features).
        weight2: W2, (paths, hidden).
        gamma: BatchNorm's weight, (channels of u,), as its bias beta and its running statistics are.
        running_mean: None, as running_var, if BatchNorm uses the batch's statistics.
        channels: Of each path.
        relu: Whether act is a ReLU, else the identity.
        overwrite: Whether the result may be written over u; torch.compile does not.

    Returns:
        The result, a map like u; what `merge_backward` needs, (6, batch, channels of u): a, b, c, the mean and the
        variance of u and the mean of v, where they are used; the mean and the variance that BatchNorm uses, (2,
        channels of u).
    """
    u, v = in_format_of(u, u), v if v is None else in_format_of(u, v)
    args = u, v, *_dense(weight1, weight2, gamma, beta, running_mean, running_var), eps, channels, relu
    if torch.compiler.is_compiling():  # which needs the operator
        return torch.ops.timm_awm.merge(*args)
    return _implementation('merge', u.device.type)(*args, overwrite=overwrite)


def merge_backward(grad: Tensor, saved: Tensor, u: Tensor, v: Optional[Tensor], *args: Any) -> List[Optional[Tensor]]:
    """The gradients of u, v (None without v), weight1, weight2, gamma and beta.

    Args:
        grad: The gradient of the result.
        saved: As from `merge`.
        args: The other arguments of `merge`.
    """
    u, v = in_format_of(u, u), v if v is None else in_format_of(u, v)
    compiling = torch.compiler.is_compiling()
    backward = torch.ops.timm_awm.merge_backward if compiling else _implementation('merge_backward', u.device.type)
    grad_u, *grads = backward(grad, saved, u, v, *_dense(*args[:6]), *args[6:])
    return [grad_u, *([None] if v is None else []), *grads]


def in_format_of(first: Tensor, x: Tensor) -> Tensor:
    """x in the memory format of the first map, channels-last if that is neither. Of gradients torch.compile does not
    know it, so that the implementations of the operators see to it."""
    return x.contiguous(memory_format=torch.contiguous_format if first.is_contiguous() else torch.channels_last)


# torch.compile stumbles over generators here
def _dense(*parameters: Optional[Tensor]) -> Tuple[Any, ...]:
    return tuple([x if x is None else x.contiguous() for x in parameters])


def empty_results(u: Tensor, overwrite: bool = False) -> Tuple[Tensor, Tensor, Tensor]:
    """Of `merge`."""
    batch, channels = u.shape[:2]
    saved = u.new_empty((6, batch, channels), dtype=wide_dtype(u))
    return u if overwrite else torch.empty_like(u), saved, saved.new_empty(2, channels)


def _fake_backward(
        grad: Tensor, saved: Tensor, u: Tensor, v: Optional[Tensor], *args: Any) -> List[Tensor]:
    return [torch.empty_like(x) for x in (u, v, *args[:4]) if x is not None]


def _implementation(name: str, device: str) -> Callable[..., Any]:
    """Of an operator, called without the dispatcher's detour where nothing needs that."""
    return getattr(importlib.import_module('.cpu' if device == 'cpu' else '.triton', __name__), name)


def _define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    torch.library.define(f'timm_awm::{name}', schema)
    torch.library.register_fake(f'timm_awm::{name}', fake)
    for device in ('cpu', 'cuda'):
        torch.library.impl(
            f'timm_awm::{name}', device, lambda *args, device=device: _implementation(name, device)(*args))


_define('merge', f'({_ARGS}) -> Tensor[]', lambda u, *_: list(empty_results(u)))
_define('merge_backward', f'(Tensor grad, Tensor saved, {_ARGS}) -> Tensor[]', _fake_backward)
