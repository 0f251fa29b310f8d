"""What fused merges are made of: one autograd function around the kernels, and what may be fused at all.

A merge, with the BatchNorm and the ReLU beside it, is y = relu(a · u + b · v + c), with coefficients for each image and
channel that follow from the channels' means and variances. docs/method.md derives it, and its gradients.
"""
import os
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import Function

from . import kernels
from .kernels import formula
from .mixing import MixingWeights, wide_dtype
from .torch_private import is_exactly, is_intercepted, is_watched

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
        if x.dim() != 4 or not torch.compiler.is_compiling() and x.is_neg():
            return False
    if (
            first.numel() == 0
            or torch.compiler.is_exporting()
            or torch.jit.is_tracing()
            or first.is_cuda and not _experimental
            or is_intercepted()
    ):
        return False
    for module, cls in skipped:
        if module is not None and not _is_plain(module, cls, maps):
            return False
    return kernels.is_available(first)


_NAMES: Dict[Any, Sequence[str]] = {
    MixingWeights: ('weight1', 'weight2'), nn.BatchNorm2d: ('weight', 'bias'), BatchNormAct2d: ('weight', 'bias')}


def _is_plain(module: Any, cls: Any, maps: Sequence[Tensor]) -> bool:
    if not is_exactly(module, cls):
        return False
    # C++ reads their memory. Dicts, as module.weight takes ten times as long
    parameters, x, channels = module._parameters, maps[0], sum([x.shape[1] for x in maps])
    for p in parameters.values():
        if not issubclass(type(p), nn.Parameter) and type(p) is not Tensor or p.device != x.device:
            return False
    if any([name not in parameters for name in _NAMES.get(cls, ())]):
        return False  # FSDP and DataParallel keep them elsewhere
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


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """As BatchNorm itself decides."""
    return norm.training or norm._buffers['running_mean'] is None


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)


def _arguments(options: Sequence[Any], parameters: Sequence[Any], maps: Sequence[Tensor]) -> Tuple[Any, ...]:
    """Those of `kernels.merge`."""
    is_sum, eps, relu = options
    u, v = maps if is_sum else (torch.cat(list(maps), dim=1), None)
    return u, v, *parameters, eps, [x.shape[1] for x in maps], relu


class _FusedMerge(Function):
    """`kernels.merge` and the mean and the variance that BatchNorm uses.

    Of a concatenation it keeps the maps, which many merges share, and concatenates them again to go backward.
    """

    @staticmethod
    def forward(ctx: Any, is_sum: bool, eps: float, relu: bool, *inputs: Any) -> Tuple[Tensor, Tensor]:
        ctx.options = is_sum, eps, relu
        y, saved, stats = kernels.merge(*_arguments(ctx.options, inputs[:6], inputs[6:]))
        ctx.save_for_backward(saved, *inputs)
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tuple[Optional[Tensor], ...]:
        results: Any
        saved, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # it is itself differentiated (create_graph=True): autograd's, of the plain formula. The inputs are aliases,
            # for one may be computed from another
            aliases: List[Any] = [x if x is None else x.view_as(x) for x in inputs]
            y = formula.merge(*_arguments(ctx.options, aliases[:6], aliases[6:]))
            needed = ctx.needs_input_grad[3:]
            results = iter(torch.autograd.grad(
                y, [x for x, need in zip(aliases, needed) if need], grad, create_graph=True, allow_unused=True))
            return None, None, None, *(next(results) if need else None for need in needed)
        maps = inputs[6:]
        results = kernels.merge_backward(grad, saved, *_arguments(ctx.options, inputs[:6], maps))
        grad_u, grad_v, *grads = results
        of_maps = grad_u.split([x.shape[1] for x in maps], dim=1) if grad_v is None else (grad_u, grad_v)
        return None, None, None, *grads, None, None, *of_maps


def fused_merge(
        maps: Sequence[Tensor], mix: Any, norm: Optional[nn.BatchNorm2d], relu: bool, is_sum: bool,
        overwrite: bool = False,
) -> Tensor:
    """A merge that `can_fuse` allowed.

    Args:
        maps: Branch and shortcut, or what is concatenated.
        mix: `MixingWeights`.
        norm: Of the branch in a sum, of what was merged in a concatenation; None for none.
        relu: Whether a ReLU comes last.
        is_sum: Else it is a concatenation.
        overwrite: Whether the branch may be overwritten where no gradients are recorded.
    """
    first = maps[0]
    dtype = wide_dtype(first)
    parameters = [mix._parameters[name].to(dtype) for name in ('weight1', 'weight2')]
    if norm is None:
        ones = torch.ones(sum([x.shape[1] for x in maps[:1 if is_sum else None]]), dtype=dtype, device=first.device)
        parameters += [ones, 0 * ones, 0 * ones, 1 * ones]  # the identity
    else:
        own, buffers = norm._parameters, norm._buffers
        running = (None, None) if uses_batch_statistics(norm) else (buffers['running_mean'], buffers['running_var'])
        parameters += [own['weight'], own['bias'], *running]
    options = is_sum, 0. if norm is None else norm.eps, relu
    if torch.is_grad_enabled():
        y, stats = _FusedMerge.apply(*options, *parameters, *maps)
    else:
        y, _, stats = kernels.merge(
            *_arguments(options, parameters, maps), overwrite=not is_sum or overwrite and not is_watched())
    if norm is not None:
        _update_running(norm, stats[0], stats[1], len(y) * y.shape[2] * y.shape[3])
    return y
