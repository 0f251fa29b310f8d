"""`passes` for CPUs, in C++.

The source is compiled when it is first used, by what torch.compile's own C++ backend uses (half a second, then it lies
in torch's cache). Maps are float32, bfloat16 or float64. torch.compile calls these functions as they are.
"""
import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Optional, Tuple

import torch
from torch import Tensor

__all__ = ['available', 'moments', 'moments_backward_', 'affine_act', 'affine_act_', 'affine_act_backward']

_TYPES = {torch.float32: 'float32', torch.bfloat16: 'bfloat16', torch.float64: 'float64'}


@functools.lru_cache(maxsize=None)
def _library() -> Optional[ctypes.CDLL]:
    try:
        from torch._inductor.codecache import CppCodeCache  # private: finds compiler and flags
        return CppCodeCache.load(Path(__file__).with_name('cpu_kernels.cpp').read_text())
    except Exception as error:
        warnings.warn(
            "The merges' C++ kernels could not be built, so they run slower, unfused; install g++ or clang, or set "
            f'TIMM_AWM_FUSED=0 to silence this. {type(error).__name__}: {str(error).strip()[:300]}', stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for maps of this type; warns once if there is no compiler."""
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


def _opaque(fake: Callable, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """For a function that torch.compile calls without looking into it; fake makes results of the right shapes."""
    def wrap(function: Callable) -> Callable:
        op = torch.library.custom_op(f'timm_awm::cpu_{function.__name__}', function, mutates_args=mutates_args)
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args):
            # an op takes its time to be called, but can be seen
            visible = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
            return (op if visible else function)(*args)
        return call

    return wrap


def _sums(x: Tensor, n: int) -> Tensor:
    return x.new_empty((n, *x.shape[:2]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _like(x: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(x) if needed else x.new_empty(0)


@_opaque(lambda x, with_var: _sums(x, 1 + with_var))
def moments(x: Tensor, with_var: bool) -> Tensor:
    out = _sums(x, 1 + with_var)
    _call('moments', x, x, out[0], out[1] if with_var else None)
    return out


@_opaque(lambda grad, x, scale, shift: None, mutates_args=('grad',))
def moments_backward_(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    _call('moments_backward', x, grad, x, scale, shift)


def _affine_act(u, v, a, b, c, relu, y) -> Tensor:
    pooled = torch.empty_like(a)
    _call('affine_act', u, int(relu), u, v, a, b, c, y, pooled)
    return pooled


@_opaque(lambda u, v, a, b, c, relu: (torch.empty_like(u), torch.empty_like(a)))
def affine_act(
        u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool,
) -> Tuple[Tensor, Tensor]:
    y = torch.empty_like(u)
    return y, _affine_act(u, v, a, b, c, relu, y)


@_opaque(lambda u, v, a, b, c, relu: torch.empty_like(a), mutates_args=('u',))
def affine_act_(u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    return _affine_act(u, v, a, b, c, relu, u)


@_opaque(lambda grad, grad_pooled, u, v, a, b, c, relu, need_u, need_v: (
    _like(u, need_u), _like(u, need_v), _sums(u, 2 if v is None else 3)))
def affine_act_backward(
        grad: Tensor, grad_pooled: Optional[Tensor], u: Tensor, v: Optional[Tensor],
        a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool, need_u: bool, need_v: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    grad_u, grad_v, sums = _like(u, need_u), _like(u, need_v), _sums(u, 2 if v is None else 3)
    _call(
        'affine_act_backward', u, int(relu), grad, grad_pooled, u, v, a, b, c, grad_u if need_u else None,
        grad_v if need_v else None, sums[0], None if v is None else sums[2], sums[1])
    return grad_u, grad_v, sums
