"""The fused merge: what may be fused at all, which is decided here and nowhere else, and its way through autograd.

A merge, with the BatchNorm and the ReLU beside it, is y = relu(a · u + b · v + c), with coefficients for each image and
channel that follow from the channels' means and variances. docs/method.md derives it, and its gradients.
"""
import functools
import logging
import os
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import Function

from . import cpu
from .mixing import MixingWeights, descriptors, weigh_concat, weigh_sum, wide_dtype
from .operands import Operands, formula
from .torch_private import has_memory, is_exactly, is_intercepted

_start = os.environ.get('TIMM_AWM_FUSED', '1')
if _start not in ('0', '1', '2'):
    logging.getLogger(__name__).warning(
        f'The environment variable TIMM_AWM_FUSED is 0 (off), 1 (on) or 2 (on accelerators too); {_start!r} is taken '
        'for 1.')
_enabled, _experimental = _start != '0', _start == '2'
_CPP_DEVICES = {'cpu'}  # on others torch.compile fuses


def set_fused_merge(enable: bool = True, experimental: bool = False) -> None:
    """Switch the fused merges on or off, for the whole process, which starts as the environment variable TIMM_AWM_FUSED
    says (0: off, 1: on, 2: experimental too).

    Off, merges are computed by the plain formula, as those that cannot be fused always are, and at the identity start a
    network gives bit for bit the output of the plain one. On, it differs by the rounding of floating point.

    Args:
        enable: Fuse on CPUs, where a C++ compiler is found.
        experimental: Fuse on accelerators too, by torch.compile, which nobody has timed there yet; what is fused so
            cannot be differentiated twice.
    """
    global _enabled, _experimental
    _enabled, _experimental = enable, enable and experimental


# A fused merge skips the calls of these functions: one that somebody has replaced must be called.
_trusted: List[Tuple[Any, str, Any]] = []


def trust(owner: Any, *names: str) -> None:
    """Remember functions as they are, if they are torch's, timm's or this package's own."""
    for name in names:
        function = getattr(owner, name)
        module = getattr(function, '__module__', None) or 'torch'  # torch's built-in functions have none
        own = module.partition('.')[0] in ('torch', 'timm', __name__.partition('.')[0])
        _trusted.append((owner, name, function if own and not hasattr(function, '__wrapped__') else None))


for _class in (nn.BatchNorm2d, BatchNormAct2d, nn.ReLU, nn.Identity, nn.Conv2d, MixingWeights):
    trust(_class, 'forward', '__call__')
trust(nn.Conv2d, '_conv_forward')
trust(F, 'batch_norm', 'relu', 'conv2d', 'linear', 'softplus')
trust(torch, 'batch_norm', 'relu', 'relu_', 'conv2d')


def _can_fuse(
        merge: Any, maps: Sequence[Tensor], norm: Any, skipped: Sequence[Tuple[Any, type]], is_sum: bool) -> bool:
    """Whether every call that fusion skips is unchanged, and the tensors are what the C++ code expects."""
    if not _enabled or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    first = maps[0]
    dtype, device = first.dtype, first.device
    for x in maps:  # before anything is asked that a proxy of torch.fx cannot answer
        if (
                type(x) is not Tensor or x.layout != torch.strided or x.dtype != dtype or x.device != device
                or x.dim() != 4 or x.is_neg() or len(x) != len(first) or x.shape[2:] != first.shape[2:]
        ):
            return False
    if first.numel() == 0 or is_sum and maps[1].shape != first.shape or is_intercepted():
        return False
    if any([getattr(owner, name) is not function for owner, name, function in _trusted]):
        return False
    mix: Any = getattr(merge, 'mix', None)
    for module, cls in (*skipped, (mix, MixingWeights), (norm, nn.BatchNorm2d if is_sum else BatchNormAct2d)):
        if module is not None and not is_exactly(module, cls):
            return False
    # dicts, as module.weight takes ten times as long; FSDP and DataParallel keep parameters elsewhere
    channels = sum([x.shape[1] for x in maps])
    weight1, weight2 = parameters = [mix._parameters.get(name) for name in ('weight1', 'weight2')]
    statistics: List[Any] = []
    if norm is not None:
        parameters = [weight1, weight2, norm._parameters.get('weight'), norm._parameters.get('bias')]
        statistics = [norm._buffers['running_mean'], norm._buffers['running_var']]
        if first.numel() == first.shape[1] and (norm.training or statistics[0] is None):
            return False  # BatchNorm's error
    for p in parameters:
        own = issubclass(type(p), nn.Parameter) and type(p).__torch_function__ is nn.Parameter.__torch_function__
        if not (own or type(p) is Tensor) or p.device != device:
            return False
    if weight1.shape != (len(weight1), channels) or weight2.shape != (len(maps), len(weight1)):
        return False
    width, wide = first.shape[1] if is_sum else channels, wide_dtype(first)  # of a sum, the branch is normalised
    for p in (*parameters[2:], *statistics):
        if p is not None and (p.dtype != wide or p.device != device or p.shape != (width,)):
            return False
    return cpu.is_available(dtype) if device.type in _CPP_DEVICES else _experimental


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)


class _FusedMerge(Function):
    """The fused merge on CPUs, and what `cpu.merge` returns last.

    Of a concatenation it keeps the maps, which many merges share, and concatenates them again to go backward.
    """

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tuple[Tensor, Tensor]:
        operands = Operands.of(*flat)
        ctx.options = operands.is_sum, operands.eps, operands.relu
        y, saved, stats = cpu.merge(operands)
        ctx.save_for_backward(saved, *flat[len(ctx.options):])
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tuple[Optional[Tensor], ...]:
        results: Any
        saved, *tensors = ctx.saved_tensors
        operands = Operands.of(*ctx.options, *tensors)
        create_graph = torch.is_grad_enabled()
        if create_graph or not has_memory(grad) or is_intercepted():
            # it is itself differentiated, or of a batch of gradients, or watched: autograd's, of the plain formula
            needed = ctx.needs_input_grad
            with torch.enable_grad():  # with respect to aliases: one input may be computed from another
                flat = [x.view_as(x) if isinstance(x, Tensor) else x for x in operands.flat()]
                y = formula(Operands.of(*flat))
                results = iter(torch.autograd.grad(
                    y, [x for x, need in zip(flat, needed) if need], grad, create_graph=create_graph,
                    allow_unused=True))
            return tuple([next(results) if need else None for need in needed])
        grad_u, grad_v, *grads = cpu.merge_backward(grad, saved, operands)
        of_maps = grad_u.split(operands.channels(), dim=1) if grad_v is None else (grad_u, grad_v)
        return *[None for _ in ctx.options], *grads, None, None, *of_maps


@functools.lru_cache(maxsize=None)
def _compiled_tail() -> Any:
    """The tail of a block, by the plain formula, as one function by torch.compile: for accelerators."""
    def tail(mix: Any, maps: List[Tensor], norm: Any, act: Any, is_sum: bool) -> Tensor:
        if not is_sum:
            y = weigh_concat(mix(descriptors(maps)), maps)
            return y if norm is None else norm(y)
        if norm is not None:
            maps = [norm(maps[0]), maps[1]]
        y = weigh_sum(mix(descriptors(maps)), *maps)
        return y if act is None else act(y)

    return torch.compile(tail, dynamic=True)


def fuse(
        merge: Any, maps: Sequence[Tensor], norm: Any, act: Any, skipped: Sequence[Tuple[Any, type]], is_sum: bool,
        conv: Any = None,
) -> Optional[Tensor]:
    """A merge with the BatchNorm and the ReLU beside it, fused; or None, with nothing done, where it cannot be fused.
    The merge's own `fused` tells the arguments; skipped are modules, or None, and the class that each must be of."""
    if not _can_fuse(merge, maps, norm, skipped, is_sum):
        return None
    first, own = maps[0], merge.mix._parameters
    if first.device.type not in _CPP_DEVICES:
        with torch._dynamo.config.patch(recompile_limit=64):  # a DenseNet has as many kinds of merges as layers
            return _compiled_tail()(merge.mix, list(maps), norm, act, is_sum)
    dtype = wide_dtype(first)
    of_norm: Any
    if norm is None:
        width = sum([x.shape[1] for x in maps[:1 if is_sum else None]])
        ones = first.new_ones(width, dtype=dtype)  # on its device, whatever the default
        of_norm = ones, 0 * ones, 0 * ones, 1 * ones  # the identity
    else:
        buffers = norm._buffers
        running = (None, None) if norm.training else (buffers['running_mean'], buffers['running_var'])
        of_norm = norm._parameters['weight'], norm._parameters['bias'], *running
    weights = own['weight1'].to(dtype), own['weight2'].to(dtype)
    operands = Operands.of(is_sum, 0. if norm is None else norm.eps, act is not None, *weights, *of_norm, *maps)
    if torch.is_grad_enabled():
        y, stats = _FusedMerge.apply(*operands.flat())
    else:
        y, _, stats = cpu.merge(operands, overwrite=is_exactly(conv, nn.Conv2d))
    if norm is not None:
        _update_running(norm, stats[0], stats[1], len(y) * y.shape[2] * y.shape[3])
    return y
