"""The passes over maps that a fused merge makes, for CPUs, in C++.

The source is compiled when it is first used, by what torch.compile's own C++ backend uses (half a second, then it lies
in torch's cache). `triton_kernels` has the same four functions.

Maps are (batch, channels, height, width), float32, bfloat16 or float64, of one shape and type in a call, channels-last
or contiguous; coefficients and results are (batch, channels), float32 (float64 for float64 maps). All is computed in
that type, and rounded once to the maps'.
"""
import ctypes
import functools
import warnings
from pathlib import Path
from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['available', 'moments', 'moments_backward_', 'affine_act', 'affine_act_backward']

_TYPES = {torch.float32: 'float32', torch.bfloat16: 'bfloat16', torch.float64: 'float64'}


@functools.lru_cache(maxsize=None)
def _library() -> Optional[ctypes.CDLL]:
    try:
        from torch._inductor.codecache import CppCodeCache  # private: finds compiler, flags and torch's own OpenMP
        return CppCodeCache.load(Path(__file__).with_name('cpu_kernels.cpp').read_text())
    except Exception as error:
        warnings.warn(
            f'Without a C++ compiler the merges run slower, unfused: {type(error).__name__}: {str(error).strip()[:300]} '
            '(install g++ or clang, or set TIMM_AWM_FUSED=0 to silence this).')
        return None


def available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for maps of this type; warns once if there is no compiler."""
    return dtype in _TYPES and _library() is not None


def _call(name: str, x: Tensor, last: bool, *args) -> None:
    batch, channels, height, width = x.shape
    pointers = [
        ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else arg if arg is None else ctypes.c_int(arg)
        for arg in args
    ]
    getattr(_library(), f'{name}_{_TYPES[x.dtype]}')(
        ctypes.c_int64(batch), ctypes.c_int64(channels), ctypes.c_int64(height * width),
        ctypes.c_int(last), ctypes.c_int(torch.get_num_threads()), *pointers)


def _same_layout(x: Tensor, *others: Optional[Tensor]) -> Tuple[bool, ...]:
    """Whether channels come last, and the maps so laid out."""
    last = not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return last, *(m if m is None else m.contiguous(memory_format=memory_format) for m in (x, *others))


def _coefficients(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over the pixels of every image and channel.

    Returns:
        Two of (batch, channels).
    """
    last, x = _same_layout(x)
    mean, var = _coefficients(x), _coefficients(x)
    _call('moments', x, last, x, mean, var)
    return mean, var


def moments_backward_(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """grad + scale · x + shift, in place if it can be."""
    last, x, grad = _same_layout(x, grad)
    _call('moments_backward', x, last, grad, x, scale, shift)
    return grad


def affine_act(
        u: Tensor,
        v: Optional[Tensor],
        a: Tensor,
        b: Optional[Tensor],
        c: Tensor,
        relu: bool,
        inplace: bool = False,
) -> Tuple[Tensor, Tensor]:
    """a · u + b · v + c, without its middle term if v is None, and a ReLU if asked for.

    Returns:
        The map y (u itself if inplace), and the mean over the pixels, before y is rounded, (batch, channels).
    """
    last, u, v = _same_layout(u, v)
    y = u if inplace else torch.empty_like(u)
    pooled = _coefficients(u)
    _call('affine_act', u, last, int(relu), u, v, a, b, c, y, pooled)
    return y, pooled


def affine_act_backward(
        grad: Tensor,
        grad_pooled: Tensor,
        u: Tensor,
        v: Optional[Tensor],
        a: Tensor,
        b: Optional[Tensor],
        c: Tensor,
        relu: bool,
        need_u: bool,
        need_v: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor], Tensor, Optional[Tensor], Tensor]:
    """Gradients of `affine_act` for those of y and of the mean: for u and v where needed, a, b (None without v) and c."""
    last, u, v, grad = _same_layout(u, v, grad)
    grad_u = torch.empty_like(u) if need_u else None
    grad_v = torch.empty_like(u) if need_v else None
    grad_a, grad_c = _coefficients(u), _coefficients(u)
    grad_b = None if v is None else _coefficients(u)
    _call(
        'affine_act_backward', u, last, int(relu), grad, grad_pooled, u, v, a, b, c, grad_u, grad_v, grad_a, grad_b,
        grad_c)
    return grad_u, grad_v, grad_a, grad_b, grad_c
