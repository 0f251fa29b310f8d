"""The kernels of the fused merges. Each reads its maps once and writes its results once.

A map is (batch, channels, height, width), contiguous or channels-last; the maps of a call have one shape, dtype and
device, and are brought into the memory format of the first. Coefficients and sums are (batch, channels), float32
(float64 for float64 maps). The kernels compute in that type, and round a map once, to its own. None takes part in
autograd.

Each kernel is an operator of `torch.library`, with an implementation in C++ (`cpu`) and one in Triton (`triton`), or in
plain torch (`formula`) for the coefficients, which stand between two kernels that read maps.
"""
import importlib
from importlib.util import find_spec
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..mixing import wide_dtype

__all__ = [
    'is_available', 'moments', 'affine_act', 'affine_act_', 'affine_act_sums', 'affine_act_grads', 'coefficients',
    'coefficients_backward']

_HAS_TRITON = torch.version.cuda is not None and find_spec('triton') is not None
_MERGE = (
    'Tensor mean, Tensor? var, Tensor? other, Tensor weight1, Tensor weight2, Tensor gamma, Tensor beta, '
    'Tensor? running_mean, Tensor? running_var, float eps, int[] channels')
_SCHEMAS = dict(
    moments='(Tensor x, bool with_var) -> Tensor',
    affine_act='(Tensor u, Tensor? v, Tensor a, Tensor? b, Tensor c, bool relu) -> Tensor',
    affine_act_='(Tensor(a!) u, Tensor a, Tensor c, bool relu) -> ()',
    affine_act_sums='(Tensor grad, Tensor u, Tensor? v, Tensor a, Tensor? b, Tensor c, bool relu) -> Tensor',
    affine_act_grads=(
        '(Tensor grad, Tensor u, Tensor? v, Tensor a, Tensor? b, Tensor c, Tensor scale, Tensor shift, '
        'Tensor? shift_v, bool relu) -> Tensor[]'),
    coefficients=f'({_MERGE}) -> Tensor[]',
    coefficients_backward=f'(Tensor grads, int pixels, {_MERGE}) -> Tensor[]',
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
    mean, *var = _call('moments', x, with_var).unbind()
    return mean, var[0] if var else None


def affine_act(u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    """act(a · u + (b · v + c)), a map like u; act(a · u + c) without v and b. act is ReLU, or the identity."""
    u, v = _uniform(u, v)
    return _call('affine_act', u, v, *_dense(a, b, c), relu)


def affine_act_(u: Tensor, a: Tensor, c: Tensor, relu: bool) -> None:
    """u = act(a · u + c), in place. u is contiguous or channels-last."""
    _call('affine_act_', u, *_dense(a, c), relu)


def affine_act_sums(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    """The gradients of a, c and b in `affine_act`, (3, batch, channels), (2, ...) without v; grad is that of its
    result."""
    u, v = _uniform(u, v)
    return _call('affine_act_sums', grad, u, v, *_dense(a, b, c), relu)


def affine_act_grads(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, scale: Tensor,
        shift: Tensor, shift_v: Optional[Tensor], relu: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """a · ḡ + scale · u + shift and b · ḡ + shift_v, maps like u, where ḡ is the gradient of what act takes; None for
    the second without v."""
    u, v = _uniform(u, v)
    grad_u, *grad_v = _call('affine_act_grads', grad, u, v, *_dense(a, b, c, scale, shift, shift_v), relu)
    return grad_u, grad_v[0] if grad_v else None


def coefficients(
        mean: Tensor, var: Optional[Tensor], other: Optional[Tensor], weight1: Tensor, weight2: Tensor, gamma: Tensor,
        beta: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], eps: float,
        channels: Sequence[int],
) -> List[Tensor]:
    """The coefficients of `affine_act`, from the moments of the paths.

    A sum normalises u and merges it with v. A concatenation merges the maps that u holds and normalises the result.

    Args:
        mean: Of u, (batch, channels of u), as var and other are.
        var: Of u; None if BatchNorm uses its running statistics.
        other: The mean of v; None in a concatenation.
        weight1: W1, (hidden, features).
        weight2: W2, (paths, hidden).
        gamma: BatchNorm's weight, (channels of u,), as its bias beta and its running statistics are.
        running_mean: None, as running_var, if BatchNorm uses the batch's statistics.
        channels: Of each path.

    Returns:
        a, c and b, (3, batch, channels of u), (2, ...) in a concatenation; the mean and the variance that BatchNorm
        uses, (2, channels of u).
    """
    parameters = _dense(weight1, weight2, gamma, beta, running_mean, running_var)
    return _call('coefficients', mean, var, other, *parameters, eps, channels)


def coefficients_backward(grads: Tensor, pixels: int, *args: Any) -> List[Tensor]:
    """From gradients of a, c and b, as `affine_act_sums` gives them, to scale, shift and shift_v of `affine_act_grads`,
    (3, batch, channels of u), (2, ...) in a concatenation, and the gradients of weight1, weight2, gamma and beta.

    Args:
        pixels: Height times width of the maps.
        args: The arguments of `coefficients`.
    """
    *tensors, eps, channels = args
    return _call('coefficients_backward', grads, pixels, *_dense(*tensors), eps, channels)


def sums_like(x: Tensor, n: int) -> Tensor:
    """An empty result of n sums for each channel of each image, (n, batch, channels)."""
    return x.new_empty((n, *x.shape[:2]), dtype=wide_dtype(x))


def in_format_of(first: Tensor, x: Tensor) -> Tensor:
    """x in the memory format of the first map, channels-last if that is neither. Of gradients torch.compile does not
    know it, so that the implementations of the operators see to it."""
    return x.contiguous(memory_format=torch.contiguous_format if first.is_contiguous() else torch.channels_last)


def _uniform(first: Tensor, *others: Optional[Tensor]) -> Tuple[Any, ...]:
    return tuple([x if x is None else in_format_of(first, x) for x in (first, *others)])


# torch.compile stumbles over generators here
def _dense(*coefficients: Optional[Tensor]) -> Tuple[Any, ...]:
    return tuple([x if x is None else x.contiguous() for x in coefficients])


_FAKES: Dict[str, Callable[..., Any]] = dict(
    moments=lambda x, with_var: sums_like(x, 1 + with_var),
    affine_act=lambda u, v, a, b, c, relu: torch.empty_like(u),
    affine_act_=lambda u, a, c, relu: None,
    affine_act_sums=lambda grad, u, v, *_: sums_like(u, 2 if v is None else 3),
    affine_act_grads=lambda grad, u, v, *_: [torch.empty_like(x) for x in (u, v) if x is not None],
    coefficients=lambda mean, var, other, *_: [
        sums_like(mean, 2 if other is None else 3), mean.new_empty(2, mean.shape[1])],
    coefficients_backward=lambda grads, pixels, *args: [torch.empty_like(x) for x in (grads, *args[3:7])],
)


def _implementation(name: str, device: str) -> Callable[..., Any]:
    """Of an operator; its module is imported when it is first called."""
    module = '.cpu' if device == 'cpu' else '.formula' if name.startswith('coefficients') else '.triton'
    return getattr(importlib.import_module(module, __name__), name)


def _call(name: str, x: Tensor, *args: Any) -> Any:
    """torch.compile needs the operator; else its implementation is called, without the dispatcher's detour."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.timm_awm, name)(x, *args)
    return _implementation(name, x.device.type)(x, *args)


def _register(name: str, device: str) -> None:
    torch.library.impl(f'timm_awm::{name}', device, lambda *args: _implementation(name, device)(*args))


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f'timm_awm::{_name}', _schema)
    torch.library.register_fake(f'timm_awm::{_name}', _FAKES[_name])
    _register(_name, 'cpu')
    _register(_name, 'cuda')
