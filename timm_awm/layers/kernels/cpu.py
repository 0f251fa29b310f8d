"""The kernels for CPUs, in C++.

The source is compiled when it is first used, by what torch.compile's own C++ backend uses (half a second, then it lies
in torch's cache). Maps are float32, bfloat16 or float64.
"""
import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any, List, Optional

import torch
from torch import Tensor

from . import in_format_of, sums_like

__all__ = ['is_available', 'moments', 'affine_act', 'affine_act_', 'affine_act_backward', 'add_affine_']

_TYPES = {torch.float32: 'float32', torch.bfloat16: 'bfloat16', torch.float64: 'float64'}


@functools.lru_cache(maxsize=None)
def _library() -> Optional[ctypes.CDLL]:
    try:
        from torch._inductor.codecache import CppCodeCache  # private: finds compiler and flags
        return CppCodeCache.load(Path(__file__).with_name('cpu.cpp').read_text(encoding='utf-8'))
    except Exception as error:  # of the compiler's set-up, of any kind
        warnings.warn(
            'The fused merges could not be built, so the plain formula is used, which is slower. Usually g++ or clang '
            f'is missing. TIMM_AWM_FUSED=0 silences this. {type(error).__name__}: {str(error).strip()[:300]}',
            stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for maps of this dtype; warns once if they cannot be built."""
    return dtype in _TYPES and _library() is not None


def _call(name: str, x: Tensor, *args: Any) -> None:
    batch, channels, height, width = x.shape
    pointers = [
        ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else arg if arg is None else ctypes.c_int(arg)
        for arg in args
    ]
    getattr(_library(), f'{name}_{_TYPES[x.dtype]}')(
        ctypes.c_int64(batch), ctypes.c_int64(channels), ctypes.c_int64(height * width),
        ctypes.c_int(not x.is_contiguous()), ctypes.c_int(torch.get_num_threads()), *pointers)


def moments(x: Tensor, with_var: bool) -> Tensor:
    out = sums_like(x, 1 + with_var)
    _call('moments', x, x, out[0], out[1] if with_var else None)
    return out


def affine_act(u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    y = torch.empty_like(u)
    _call('affine_act', u, int(relu), u, v, a, b, c, y)
    return y


def affine_act_(u: Tensor, a: Tensor, c: Tensor, relu: bool) -> None:
    _call('affine_act', u, int(relu), u, None, a, None, c, u)


def affine_act_backward(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> List[Tensor]:
    grads = [torch.empty_like(u) for x in (u, v) if x is not None]
    sums = sums_like(u, 1 + len(grads))
    grad_v, sum_v = (None, None) if v is None else (grads[1], sums[2])
    grad = in_format_of(u, grad)
    _call('affine_act_backward', u, int(relu), grad, u, v, a, b, c, grads[0], grad_v, sums[0], sum_v, sums[1])
    return [*grads, sums]


def add_affine_(grad: Tensor, x: Tensor, scale: Optional[Tensor], shift: Tensor) -> None:
    result = in_format_of(x, grad)
    _call('add_affine', x, result, x, scale, shift)
    if result is not grad:
        grad.copy_(result)
