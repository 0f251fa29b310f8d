"""The fused merge: normalise, weigh, merge and activate in the passes over maps that the plain network makes too.

Of a block's tail

    y = relu(n λ1 · BatchNorm(u) + n λ2 · x)

everything but the maps u, x and y is (batch, channels) or smaller: BatchNorm's statistics follow from the means and
variances of each image's channels, so do the descriptors of eq. 3, and the whole tail is y = relu(a · u + b · x + c),
with coefficients for each image and channel. So four `passes` do: moments, affine_act and the gradients of both; the
rest, here, is arithmetic on small tensors.
"""
import functools
import os
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.modules import module as torch_module

from . import passes
from .functional import descriptor, mixing_logits, scaled_mixing_weights, weighted_sum

__all__ = ['set_fused_merge', 'fused_merge', 'fused_concat', 'map_moments', 'can_fuse', 'is_intercepted']

torch.fx.wrap('descriptor')  # torch.fx cannot follow the dtype of a proxy

_start = os.environ.get('TIMM_AWM_FUSED', '1')
if _start not in ('0', '1', '2'):
    raise ValueError(f'The environment variable TIMM_AWM_FUSED is 0 (off), 1 (on) or 2 (on GPUs too), not {_start!r}.')
_enabled, _experimental = _start != '0', _start == '2'
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # torch 2.6 cannot tell them apart


def set_fused_merge(enable: bool = True, experimental: bool = False) -> None:
    """Switch the fused merges on or off, for the whole process.

    The environment variable TIMM_AWM_FUSED (0: off, 1: on, 2: experimental too) says how it starts.

    Off, a merge is computed by the plain formula, and an AWM network at the identity start gives bit for bit the output
    of the plain network; on, it differs by the rounding of floating point. Merges that cannot be fused are computed by
    the plain formula anyway.

    Args:
        enable: Fuse on CPUs, where a C++ compiler is found.
        experimental: Fuse on NVIDIA GPUs too, by Triton kernels that nobody has timed yet.
    """
    global _enabled, _experimental
    _enabled, _experimental = enable, enable and experimental


def _by_plain_formula(plain: Callable) -> Callable[[Callable], Callable]:
    """A backward pass that is itself differentiated (create_graph=True) or batched is autograd's, of the plain formula.

    That takes the inputs of the function: the constants in ctx.constants, then the tensors that were saved first.
    """
    def wrap(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            create_graph = torch.is_grad_enabled()
            # torch.autograd.functional.jacobian(vectorize=True) and is_grads_batched=True
            batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)
            if not create_graph and not batched:
                return backward(ctx, *grads)
            need = ctx.needs_input_grad[len(ctx.constants):]
            with torch.enable_grad():
                # aliases, for one input may be computed from another
                inputs = [x if x is None else x.view_as(x) for x in ctx.saved_tensors[:len(need)]]
                outputs = plain(*ctx.constants, *inputs)
            results = iter(torch.autograd.grad(
                outputs, [x for x, n in zip(inputs, need) if n], grads[:len(outputs)], create_graph=create_graph,
                allow_unused=True))
            return *(None for _ in ctx.constants), *(next(results) if n else None for n in need)
        return wrapper
    return wrap


class _Affine(NamedTuple):
    """A path k · x + s of a raw map x; k and s, (channels,), are those of a BatchNorm, None if there is none."""
    mean: Tensor  # of x over pixels, (batch, channels)
    k: Optional[Tensor] = None
    s: Optional[Tensor] = None

    def descriptor(self) -> Tensor:
        return self.mean if self.k is None or self.s is None else torch.addcmul(self.s, self.mean, self.k)


def _coefficients(scales: Tensor, paths: List[_Affine]) -> Tuple[Tensor, Tensor, Tensor]:
    """a, b, c of a · x1 + b · x2 + c = Σ scale · path, each (batch, channels)."""
    ab, c = [], None
    for i, path in enumerate(paths):
        scale = scales[:, i:i + 1]
        ab.append(scale.expand_as(path.mean) if path.k is None else scale * path.k)
        if path.s is not None:
            c = scale * path.s if c is None else torch.addcmul(c, scale, path.s)
    return ab[0], ab[1], torch.zeros_like(ab[0]) if c is None else c


def _plain_merge(relu, eps, u, v, pooled, w1, w2, *norm_params):
    branch, shortcut = (
        x if e is None else F.batch_norm(x, None, None, weight, bias, training=True, eps=e)
        for x, e, weight, bias in zip((u, v), eps, norm_params[::2], norm_params[1::2]))
    z = torch.cat([descriptor(branch), descriptor(shortcut) if pooled is None else pooled], dim=1)
    y = weighted_sum(branch, shortcut, scaled_mixing_weights(mixing_logits(z, w1, w2)))
    y = y.relu() if relu else y
    return y, descriptor(y)


class _FusedMerge(Function):
    """Forward and hand-derived backward of a merge of two paths, each with a BatchNorm in train mode or none."""

    @staticmethod
    def forward(ctx, relu, eps, u, v, pooled, w1, w2, *norm_params):
        """
        Args:
            relu: Whether a ReLU follows.
            eps: Those of the BatchNorms of the two paths, None where there is none.
            u, v: Raw maps of the paths, (batch, channels, height, width).
            pooled: The mean of v over pixels where it is known, (batch, channels).
            w1, w2: The merge's weights.
            norm_params: Weight and bias of the BatchNorm of u, of v; None where there is none.

        Returns:
            The merged map, its mean over pixels, and the batch statistics, mean and biased variance, of each BatchNorm.
        """
        paths, saved, batch_statistics = [], [], []
        for x, e, weight, bias, mean in zip((u, v), eps, norm_params[::2], norm_params[1::2], (None, pooled)):
            if e is None:
                paths.append(_Affine(passes.mean(x) if mean is None else mean))
                saved += [None, None]
            else:
                mean, var = passes.moments(x)
                mu = mean.mean(0)
                deviation = mean - mu
                var = var.addcmul_(deviation, deviation).mean(0)
                invstd = (var + e).rsqrt_()
                k = weight * invstd
                paths.append(_Affine(mean, k, torch.addcmul(bias, mu, k, value=-1)))
                saved += [mu, invstd]
                batch_statistics += [mu, var]
        z = torch.cat([path.descriptor() for path in paths], dim=1)
        with torch.autocast(z.device.type, enabled=False):
            hidden = (z @ w1.t()).relu_()
            logits = hidden @ w2.t()
        scales = scaled_mixing_weights(logits)
        a, b, c = _coefficients(scales, paths)
        y, y_pooled = passes.affine_act(u, v, a, b, c, relu)
        ctx.constants = relu, eps
        ctx.mark_non_differentiable(*batch_statistics)
        ctx.save_for_backward(
            u, v, pooled, w1, w2, *norm_params, a, b, c, z, hidden, logits, scales, *saved,
            *(t for path in paths for t in path))
        return y, y_pooled, *batch_statistics

    @staticmethod
    @_by_plain_formula(_plain_merge)
    def backward(ctx, grad, grad_pooled, *_):
        (u, v, pooled, w1, w2, weight_u, _, weight_v, _, a, b, c, z, hidden, logits, scales, *rest) = ctx.saved_tensors
        norms = (rest[0:2], rest[2:4])
        paths = (_Affine(*rest[4:7]), _Affine(*rest[7:10]))
        need_u, need_v, _, need_w1, need_w2, *_ = ctx.needs_input_grad[2:]
        pixels = u.shape[2] * u.shape[3]
        grad_u, grad_v, grad_a, grad_b, grad_c = passes.affine_act_backward(
            grad, grad_pooled, u, v, a, b, c, ctx.constants[0], need_u, need_v)

        # through the coefficients to n λ, times n λ: all that the logits need, and no small λ is divided by
        weighted = torch.stack([
            (grad_x * coefficient if path.s is None else torch.addcmul(
                grad_x * coefficient, grad_c * path.s, scales[:, i:i + 1])).sum(1)
            for i, (path, grad_x, coefficient) in enumerate(zip(paths, (grad_a, grad_b), (a, b)))
        ], dim=1)
        lambdas = scales / 2
        grad_logits = torch.sigmoid(-logits) * (weighted - lambdas * weighted.sum(1, keepdim=True))
        with torch.autocast(z.device.type, enabled=False):
            grad_hidden = (grad_logits @ w2) * (hidden > 0)
            grad_w2 = grad_logits.t() @ hidden if need_w2 else None
            grad_w1 = grad_hidden.t() @ z if need_w1 else None
            grad_z = grad_hidden @ w1

        channels = u.shape[1]
        grads = []
        for i, (x, path, grad_x, grad_k, weight, (mu, invstd), descriptor_known) in enumerate(zip(
                (u, v), paths, (grad_u, grad_v), (grad_a, grad_b), (weight_u, weight_v), norms,
                (False, pooled is not None))):
            scale, grad_mean = scales[:, i:i + 1], grad_z[:, i * channels:(i + 1) * channels]
            if path.k is None:
                grad_weight = grad_bias = None
                if grad_x is not None and not descriptor_known:
                    grad_x = passes.moments_backward_(grad_x, x, torch.zeros_like(a), grad_mean / pixels)
            else:
                # s = bias - mu k, k = weight invstd; z = mean k + s
                grad_bias = torch.addcmul(grad_mean, grad_c, scale).sum(0)
                grad_k = torch.addcmul(grad_mean * path.mean, grad_k, scale).sum(0) - mu * grad_bias
                grad_weight = grad_k * invstd
                if grad_x is not None:
                    # the variance's gradient acts on x - mu, the mean's on all alike
                    q = grad_k * weight * invstd.pow(3) / -(len(x) * pixels)
                    shift = torch.addcmul(-(path.k * grad_bias / len(x)), grad_mean, path.k) / pixels - q * mu
                    grad_x = passes.moments_backward_(grad_x, x, q.expand_as(a), shift)
            grads.append((grad_x, grad_mean if descriptor_known else None, grad_weight, grad_bias))
        (grad_u, _, grad_weight_u, grad_bias_u), (grad_v, grad_known, grad_weight_v, grad_bias_v) = grads
        return (
            None, None, grad_u, grad_v, grad_known, grad_w1, grad_w2, grad_weight_u, grad_bias_u, grad_weight_v,
            grad_bias_v)


def can_fuse(x: Tensor) -> bool:
    """Whether there are fused merges for a map of this device and dtype, and the mode of the day allows them.

    What exports or transforms a network sees the plain formula, and so does every tensor that is not just one.
    """
    return (
        _enabled
        and type(x) is Tensor
        and not _is_exporting()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and x.numel() > 0
        and (not x.is_cuda or _experimental)
        and passes.available(x)
    )


def is_intercepted(*modules: Optional[nn.Module]) -> bool:
    """Whether something hangs on the call of a module, hooks for instance, so that it must really be called."""
    return bool(
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    ) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or m._compiled_call_impl is not None or 'forward' in vars(m)
        for m in modules if m is not None)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _full_precision(x: Tensor, params: List[Optional[Tensor]]) -> bool:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return all(p is not None and p.dtype == dtype for p in params)


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """As torch.nn.BatchNorm2d does; but once in a step under activation checkpointing, where that updates twice."""
    if not norm.track_running_stats or norm.running_mean is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)


def fused_merge(
        mix: nn.Module,
        u: Tensor,
        v: Tensor,
        norm: Optional[nn.Module] = None,
        shortcut_norm: Optional[nn.Module] = None,
        act: Optional[nn.Module] = None,
        pooled: Optional[Tensor] = None,
        origin: Optional[Tuple[nn.Conv2d, Tensor]] = None,
) -> Optional[Tuple[Tensor, Tensor]]:
    """act(n λ1 · norm(u) + n λ2 · shortcut_norm(v)), fused.

    Args:
        mix: Infers λ, a `MixingWeights` of two paths.
        u: (batch, channels, height, width).
        v: Of the same shape.
        norm: BatchNorm2d over u, none if None.
        shortcut_norm: BatchNorm2d over v, none if None.
        act: ReLU, none if None.
        pooled: The mean of v over its pixels, if it is known, (batch, channels). Gradients flow to it; with a
            shortcut_norm, which needs more of v, it is not used.
        origin: The convolution that u has come from, and what that took, if nobody else holds u. Where no gradients are
            needed, λ is known from the latter if it is cheaper to read, and u is overwritten.

    Returns:
        The merged map and its mean over its pixels, (batch, channels); or None, with nothing done, where it cannot be
        fused.
    """
    if not can_fuse(u):
        return None
    norms = [norm, shortcut_norm]
    if (
            type(v) is not Tensor or v.dtype != u.dtype or v.shape != u.shape or v.device != u.device
            or not all(m is None or type(m) is nn.BatchNorm2d for m in norms)
            or not (act is None or type(act) is nn.ReLU)
            or is_intercepted(mix, norm, shortcut_norm, act)
    ):
        return None
    params = [mix.weight1, mix.weight2] + [p for m in norms if m is not None for p in (m.weight, m.bias)]
    if not _full_precision(u, params):
        return None
    # as BatchNorm itself decides
    batch_stats = [m.training or m.running_mean is None for m in norms if m is not None]
    relu = act is not None
    if all(batch_stats) and (batch_stats or _needs_grad(u, v, *params)):
        count = u.numel() // u.shape[1]
        if batch_stats and count == 1:
            return None  # torch's own error
        y, y_pooled, *statistics = _FusedMerge.apply(
            relu, [None if m is None else m.eps for m in norms], u, v,
            pooled if shortcut_norm is None else None, mix.weight1, mix.weight2,
            *(p for m in norms for p in ((None, None) if m is None else (m.weight, m.bias))))
        for m, mu, var in zip([m for m in norms if m is not None], statistics[::2], statistics[1::2]):
            _update_running(m, mu, var, count)
        return y, y_pooled
    if any(batch_stats) or _needs_grad(u, v, *params):
        return None
    paths = []
    mean = None if origin is None else _pooled_conv(*origin, u)
    for x, m, known in ((u, norm, mean), (v, shortcut_norm, pooled)):
        known = passes.mean(x) if known is None else known
        if m is None:
            paths.append(_Affine(known))
        else:
            k = m.weight * (m.running_var + m.eps).rsqrt()
            paths.append(_Affine(known, k, torch.addcmul(m.bias, m.running_mean, k, value=-1)))
    scales = mix(torch.cat([path.descriptor() for path in paths], dim=1))
    return (passes.affine_act if origin is None else passes.affine_act_)(u, v, *_coefficients(scales, paths), relu)


def _pooled_conv(conv: nn.Conv2d, x: Tensor, u: Tensor) -> Optional[Tensor]:
    """The mean of u = conv(x) over pixels, (batch, out_channels), from that of x, if conv is a 1x1 convolution.

    None if it is another, or if u is less to read than x and the weights.
    """
    if (
            conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1
            or x.numel() + conv.weight.numel() >= u.numel()
    ):
        return None
    z = passes.mean(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(z, conv.weight.flatten(1).to(z.dtype), None if conv.bias is None else conv.bias.to(z.dtype))


def _plain_moments(x):
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (2, 3), correction=0)
    return x.view_as(x), mean, var


class _Moments(Function):
    """Mean and biased variance over pixels, and the map itself, whose gradient then waits for theirs."""

    @staticmethod
    def forward(ctx, x):
        mean, var = passes.moments(x)
        ctx.constants = ()
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var

    @staticmethod
    @_by_plain_formula(_plain_moments)
    def backward(ctx, grad, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        scale = grad_var * (2 / pixels)
        grad = torch.empty_like(x).copy_(grad)  # others may hold autograd's
        return passes.moments_backward_(grad, x, scale, grad_mean / pixels - scale * mean)


def _plain_affine_act(relu, x, a, c):
    y = (a[:, :, None, None] * x + c[:, :, None, None]).to(x.dtype)
    return y.relu() if relu else y,


class _AffineAct(Function):
    """a · x + c and a ReLU if asked for."""

    @staticmethod
    def forward(ctx, relu, x, a, c):
        ctx.constants = relu,
        ctx.save_for_backward(x, a, c)
        return passes.affine_act(x, None, a, None, c, relu)[0]

    @staticmethod
    @_by_plain_formula(_plain_affine_act)
    def backward(ctx, grad):
        x, a, c = ctx.saved_tensors
        grad_x, _, grad_a, _, grad_c = passes.affine_act_backward(
            grad, None, x, None, a, None, c, *ctx.constants, ctx.needs_input_grad[1], False)
        return None, grad_x, grad_a, grad_c


def map_moments(x: Tensor, variance: bool) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """What a dense block keeps of a map, read once when it is made.

    Args:
        x: (batch, channels, height, width).
        variance: Whether batch statistics are to follow from it.

    Returns:
        The map, to be used from now on; its `descriptor`, and its biased variance over pixels, both (batch, channels),
        None where it is not asked for or cannot be had by the way.
    """
    if not can_fuse(x) or not variance and torch.is_grad_enabled():
        return x, descriptor(x), None
    if not variance:
        return x, passes.mean(x), None
    return _Moments.apply(x)


def fused_concat(
        mix: nn.Module,
        maps: List[Tensor],
        means: List[Tensor],
        variances: Optional[List[Tensor]] = None,
        norm: Optional[nn.BatchNorm2d] = None,
        relu: bool = False,
) -> Optional[Tensor]:
    """relu(norm([n λi · map_i])), the weights and the normalisation in one pass.

    Args:
        mix: Infers λ, a `MixingWeights` of n paths.
        maps: n maps, (batch, channels[i], height, width).
        means: Their means over pixels, (batch, channels[i]).
        variances: Their variances, of the same shapes, where batch statistics are to follow from them.
        norm: A BatchNorm over all channels, none if None.
        relu: Whether a ReLU follows.

    Returns:
        (batch, sum of channels, height, width), or None, with nothing done, where it cannot be fused.
    """
    if not can_fuse(maps[0]):
        return None
    batch_stats = norm is not None and (norm.training or norm.running_mean is None)
    count = maps[0][:, 0].numel()
    params = [mix.weight1, mix.weight2] + ([] if norm is None else [norm.weight, norm.bias])
    if (
            len(maps) != mix.num_paths
            or any(type(x) is not Tensor or x.dtype != maps[0].dtype for x in maps)
            or batch_stats and (count == 1 or not variances)
            or not _full_precision(maps[0], params)
    ):
        return None
    mean = torch.cat(means, dim=1)
    scales = mix(mean)
    channels = torch.tensor([x.shape[1] for x in maps], device=scales.device)
    a = scales.repeat_interleave(channels, dim=1, output_size=mean.shape[1])
    if norm is None:
        c = torch.zeros_like(a)
    else:
        mu, var = norm.running_mean, norm.running_var
        if batch_stats:
            weighted = a * mean
            mu = weighted.mean(0)
            var = (a.square() * torch.cat(variances or [], dim=1) + (weighted - mu).square()).mean(0)
            _update_running(norm, mu.detach(), var.detach(), count)
        k = norm.weight * (var + norm.eps).rsqrt()
        c = (norm.bias - mu * k).expand_as(a)
        a = a * k
    x = torch.cat(maps, dim=1)
    if torch.is_grad_enabled():
        return _AffineAct.apply(relu, x, a, c)
    return passes.affine_act_(x, None, a, None, c, relu)[0]  # x is new
