"""What fused merges are made of: one autograd function around the kernels, and what may be fused at all.

A merge, with the BatchNorm and the ReLU beside it, is y = relu(a · u + b · v + c), with coefficients for each image and
channel that follow from the channels' means and variances. docs/method.md derives it, and its gradients.
"""
import os
from typing import Any, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.modules import module as torch_module

from . import kernels
from .kernels import formula
from .mixing import MixingWeights, wide_dtype

__all__ = ['set_fused_merge', 'can_fuse', 'fused_merge']

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
    if not _enabled:
        return False
    first = maps[0]
    dtype, device = first.dtype, first.device
    for x in maps:  # before anything is asked that a proxy of torch.fx cannot answer
        if type(x) is not Tensor or x.layout != torch.strided or x.dtype != dtype or x.device != device:
            return False
    if (
            first.numel() == 0
            or torch.compiler.is_exporting()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or first.is_cuda and not _experimental
            or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    ):
        return False
    for module, cls in skipped:
        if module is not None and not _is_plain(module, cls, maps):
            return False
    return kernels.is_available(first)


def _is_plain(module: Any, cls: Any, maps: Sequence[Tensor]) -> bool:
    if (
            type(module) is not cls
            or module._forward_hooks or module._forward_pre_hooks
            or module._backward_hooks or module._backward_pre_hooks
            or module._compiled_call_impl is not None or 'forward' in module.__dict__
    ):
        return False
    # C++ reads their memory. Dicts, as module.weight takes ten times as long
    parameters, x, channels = module._parameters, maps[0], sum([x.shape[1] for x in maps])
    for p in parameters.values():
        if type(p) is not nn.Parameter and type(p) is not Tensor or p.device != x.device:
            return False
    if cls is MixingWeights:
        weight1, weight2 = parameters['weight1'], parameters['weight2']
        return weight1.shape == (len(weight1), channels) and weight2.shape == (len(maps), len(weight1))
    if not parameters:
        return True
    if x.numel() == x.shape[1] and uses_batch_statistics(module):
        return False
    if cls is nn.BatchNorm2d:
        channels = x.shape[1]  # of a sum, it normalises the branch
    dtype = wide_dtype(x)
    buffers = module._buffers['running_mean'], module._buffers['running_var']
    for p in (parameters['weight'], parameters['bias'], *buffers):
        if p is not None and (p.dtype != dtype or p.device != x.device or p.shape != (channels,)):
            return False
    return True


def uses_batch_statistics(norm: Optional[nn.BatchNorm2d]) -> bool:
    """As BatchNorm itself decides."""
    return norm is not None and (norm.training or norm._buffers['running_mean'] is None)


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)


class _FusedMerge(Function):
    """`kernels.merge` and the mean and the variance that BatchNorm uses."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tuple[Tensor, Tensor]:
        y, saved, stats = kernels.merge(*args)
        ctx.save_for_backward(*args[:8], saved)
        ctx.options = args[8:]
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tuple[Optional[Tensor], ...]:
        *inputs, saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # it is itself differentiated (create_graph=True): autograd's, of the plain formula. The inputs are aliases,
            # for one may be computed from another
            aliases: List[Any] = [x if x is None else x.view_as(x) for x in inputs]
            needed = ctx.needs_input_grad
            results: Any = iter(torch.autograd.grad(
                formula.merge(*aliases, *ctx.options), [x for x, need in zip(aliases, needed) if need], grad,
                create_graph=True, allow_unused=True))
            return tuple(next(results) if need else None for need in needed)
        return *kernels.merge_backward(grad, saved, *inputs, *ctx.options), *5 * [None]


def fused_merge(
        u: Tensor, v: Optional[Tensor], mix: Any, norm: Optional[nn.BatchNorm2d], channels: Sequence[int], relu: bool,
) -> Tensor:
    """A merge that `can_fuse` allowed: of u and v, or of the maps that u, a new tensor, holds.

    Args:
        u: (batch, channels, height, width).
        v: Of the same shape; None for a concatenation.
        mix: `MixingWeights`.
        norm: Of u in a sum, of what was merged in a concatenation; None for none.
        channels: Of each path.
        relu: Whether a ReLU comes last.
    """
    dtype = wide_dtype(u)
    weights = [mix._parameters[name].to(dtype) for name in ('weight1', 'weight2')]
    if norm is None:
        gamma = torch.ones(u.shape[1], dtype=dtype, device=u.device)
        args = *weights, gamma, 0 * gamma, 0 * gamma, 1 * gamma, 0., channels  # the identity; torch.compile wants four
    else:
        own, buffers = norm._parameters, norm._buffers
        running = (None, None) if uses_batch_statistics(norm) else (buffers['running_mean'], buffers['running_var'])
        args = *weights, own['weight'], own['bias'], *running, norm.eps, channels
    y, stats = _FusedMerge.apply(u, v, *args, relu)
    if norm is not None:
        _update_running(norm, stats[0], stats[1], len(u) * u.shape[2] * u.shape[3])
    return y
