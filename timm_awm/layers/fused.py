"""What fused merges are made of: two differentiable functions around the kernels, and what may be fused at all.

A merge, with the BatchNorm and the ReLU beside it, is y = relu(a · u + b · v + c), with coefficients for each image and
channel that follow from the channels' means and variances. So few kernels do on the maps what is to be done; the
rest is ordinary arithmetic on (batch, channels) tensors. docs/method.md derives it.
"""
import functools
import os
from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.modules import module as torch_module

from . import kernels

__all__ = ['set_fused_merge', 'can_fuse', 'moments', 'affine_act', 'batch_norm_affine']

_start = os.environ.get('TIMM_AWM_FUSED', '1')
if _start not in ('0', '1', '2'):
    raise ValueError(f'The environment variable TIMM_AWM_FUSED is 0 (off), 1 (on) or 2 (on GPUs too), not {_start!r}.')
_enabled, _experimental = _start != '0', _start == '2'


def set_fused_merge(enable: bool = True, experimental: bool = False) -> None:
    """Switch the fused merges on or off, for the whole process.

    The environment variable TIMM_AWM_FUSED (0: off, 1: on, 2: experimental too) says how it starts.

    Off, a merge is computed by the plain formula, and an AWM network at the identity start gives bit for bit the output
    of the plain network. On, it differs by the rounding of floating point. Merges that cannot be fused are computed by
    the plain formula anyway.

    Args:
        enable: Fuse on CPUs, where a C++ compiler is found.
        experimental: Fuse on NVIDIA GPUs too, by Triton kernels that nobody has timed yet.
    """
    global _enabled, _experimental
    _enabled, _experimental = enable, enable and experimental


def can_fuse(maps: Sequence[Tensor], skipped: Iterable[Tuple[Optional[nn.Module], type]]) -> bool:
    """Whether a merge of these maps can be fused. This is the one place that decides it.

    Args:
        maps: What is merged, (batch, channels[i], height, width).
        skipped: The modules whose call would be skipped, None if absent, and the class that each must be of. A
            module is trusted only if it is exactly of this class and nothing hangs on its call.
    """
    first = maps[0]
    if not _enabled or any(
            type(x) is not Tensor or x.layout != torch.strided or x.dtype != first.dtype or x.device != first.device
            for x in maps):
        return False
    if (
            first.numel() == 0
            or torch.compiler.is_exporting()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or first.is_cuda and not _experimental
            or not kernels.is_available(first)
    ):
        return False
    if (
            torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    ):
        return False
    return all(_is_plain(module, cls, first) for module, cls in skipped if module is not None)


def _is_plain(module: Any, cls: Any, x: Tensor) -> bool:
    if (
            type(module) is not cls
            or module._forward_hooks or module._forward_pre_hooks
            or module._backward_hooks or module._backward_pre_hooks
            or module._compiled_call_impl is not None or 'forward' in vars(module)
    ):
        return False
    if not isinstance(module, nn.BatchNorm2d):
        return True
    if uses_batch_statistics(module) and x.numel() == x.shape[1]:
        return False  # torch's own error
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return all(p is not None and p.dtype == dtype for p in (module.weight, module.bias))


def uses_batch_statistics(norm: Optional[nn.BatchNorm2d]) -> bool:
    """As BatchNorm itself decides."""
    return norm is not None and (norm.training or norm.running_mean is None)


def batch_norm_affine(
        norm: nn.BatchNorm2d, mean: Tensor, var: Optional[Tensor], pixels: int) -> Tuple[Tensor, Tensor]:
    """A BatchNorm as k · x + s. Updates its running statistics as torch does.

    Args:
        norm: With weight and bias.
        mean: Of x over pixels, (batch, channels).
        var: The biased variance, of the same shape; None for the running statistics.
        pixels: Height times width of x.

    Returns:
        k and s, (channels,).
    """
    if var is None:
        mu, sigma2 = norm.running_mean, norm.running_var
    else:
        mu = mean.mean(0)
        sigma2 = (var + (mean - mu).square()).mean(0)
        _update_running(norm, mu.detach(), sigma2.detach(), len(mean) * pixels)
    k = norm.weight * (sigma2 + norm.eps).rsqrt()
    return k, norm.bias - mu * k


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)


def _twice_differentiable(plain: Callable[..., Tuple[Tensor, ...]]) -> Callable[[Callable], Callable]:
    """A backward pass that is itself differentiated (create_graph=True) is autograd's, of the plain formula.

    plain takes what the function took: the tensors that were saved first, and ctx.flag.
    """
    def wrap(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *grads)
            needed = ctx.needs_input_grad[:-1]
            # aliases, for one input may be computed from another
            inputs: List[Any] = [x if x is None else x.view_as(x) for x in ctx.saved_tensors[:len(needed)]]
            outputs = plain(*inputs, ctx.flag)
            results: Any = iter(torch.autograd.grad(
                outputs, [x for x, need in zip(inputs, needed) if need], grads[:len(outputs)], create_graph=True,
                allow_unused=True))
            return *(next(results) if need else None for need in needed), None
        return wrapper
    return wrap


def _wide(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _plain_moments(x: Tensor, with_var: bool) -> Tuple[Tensor, ...]:
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (2, 3), correction=0)
    return (x.view_as(x), mean, var) if with_var else (x.view_as(x), mean)


class _Moments(Function):
    """The map itself, its mean and its variance. The map is returned so that its gradient waits for theirs, which are
    added in place: that gradient is a new tensor of `_AffineAct`, and nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, with_var: bool) -> Tuple[Tensor, ...]:
        mean, var = kernels.moments(x, with_var)
        ctx.flag = with_var
        ctx.save_for_backward(x, mean)
        return (x.view_as(x), mean) if var is None else (x.view_as(x), mean, var)

    @staticmethod
    @_twice_differentiable(_plain_moments)
    def backward(
            ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Optional[Tensor] = None,
    ) -> Tuple[Optional[Tensor], None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        x, mean = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        shift = grad_mean / pixels
        if grad_var is None:
            kernels.add_affine_(grad, x, None, shift)
        else:
            scale = grad_var * (2 / pixels)
            kernels.add_affine_(grad, x, scale, torch.addcmul(shift, scale, mean, value=-1))
        return grad, None


def _plain_affine_act(
        u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tuple[Tensor]:
    y = _wide(a) * u + _wide(c)
    if v is not None and b is not None:
        y = y + _wide(b) * v
    y = y.to(u.dtype)
    return y.relu() if relu else y,


class _AffineAct(Function):
    @staticmethod
    def forward(
            ctx: Any, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
        ctx.flag = relu
        ctx.save_for_backward(u, v, a, b, c)
        return kernels.affine_act(u, v, a, b, c, relu)

    @staticmethod
    @_twice_differentiable(_plain_affine_act)
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        u, v, a, b, c = ctx.saved_tensors
        return *kernels.affine_act_backward(grad, u, v, a, b, c, ctx.flag), None


def moments(x: Tensor, with_var: bool) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """The map, to be given to `affine_act` and to nobody else; mean and biased variance over the pixels of each
    image's channels, (batch, channels), the latter None if it is not asked for."""
    if not torch.is_grad_enabled():
        return x, *kernels.moments(x, with_var)
    x, mean, *var = _Moments.apply(x, with_var)
    return x, mean, var[0] if var else None


def affine_act(
        u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    """As `kernels.affine_act`, differentiable. u and v are results of `moments`."""
    return (_AffineAct.apply if torch.is_grad_enabled() else kernels.affine_act)(u, v, a, b, c, relu)
