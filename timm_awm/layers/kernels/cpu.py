"""The kernels for CPUs, in C++.

The source is compiled when it is first used, by what torch.compile's own C++ backend uses: some seconds for each type
of maps, which are float32, bfloat16 or float64. Then it lies in torch's cache.
"""
import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor

from . import in_format_of, sums_like

__all__ = [
    'is_available', 'moments', 'affine_act', 'affine_act_', 'affine_act_sums', 'affine_act_grads', 'coefficients',
    'coefficients_backward']

_TYPES = {torch.float32: 'float', torch.bfloat16: 'bfloat16', torch.float64: 'double'}


@functools.lru_cache(maxsize=None)
def _library(dtype: torch.dtype) -> Optional[ctypes.CDLL]:
    try:
        from torch._inductor.codecache import CppCodeCache  # private: finds compiler and flags
        wide = 'double' if dtype == torch.float64 else 'float'
        source = Path(__file__).with_name('cpu.cpp').read_text(encoding='utf-8')
        return CppCodeCache.load(f'#define MAP {_TYPES[dtype]}\n#define WIDE {wide}\n{source}')
    except Exception as error:  # of the compiler's set-up, of any kind
        warnings.warn(
            'The fused merges could not be built, so the plain formula is used, which is slower. Usually g++ or clang '
            f'is missing. TIMM_AWM_FUSED=0 silences this. {type(error).__name__}: {str(error).strip()[:300]}',
            stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for maps of this dtype; warns once if they cannot be built."""
    return dtype in _TYPES and _library(dtype) is not None


def _address(x: Optional[Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


def _addresses(*tensors: Optional[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*map(_address, tensors))


def _call(name: str, x: Tensor, *args: Any) -> None:
    batch, channels, height, width = x.shape
    numbers = batch, channels, height * width, not x.is_contiguous(), torch.get_num_threads()
    getattr(_library(x.dtype), name)(*(
        ctypes.c_int64(arg) if isinstance(arg, int) else ctypes.c_void_p(_address(arg)) for arg in (*numbers, *args)))


def moments(x: Tensor, with_var: bool) -> Tensor:
    out = sums_like(x, 1 + with_var)
    _call('moments', x, x, out[0], out[1] if with_var else None)
    return out


def affine_act(u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    y = torch.empty_like(u)
    _call('affine_act', u, relu, u, v, a, b, c, y)
    return y


def affine_act_(u: Tensor, a: Tensor, c: Tensor, relu: bool) -> None:
    _call('affine_act', u, relu, u, None, a, None, c, u)


def affine_act_sums(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, relu: bool) -> Tensor:
    sums = sums_like(u, 2 if v is None else 3)
    sum_a, sum_c, sum_b = _three(sums)
    _call('affine_act_sums', u, relu, in_format_of(u, grad), u, v, a, b, c, sum_a, sum_b, sum_c)
    return sums


def affine_act_grads(
        grad: Tensor, u: Tensor, v: Optional[Tensor], a: Tensor, b: Optional[Tensor], c: Tensor, scale: Tensor,
        shift: Tensor, shift_v: Optional[Tensor], relu: bool,
) -> List[Tensor]:
    grads = [torch.empty_like(u) for x in (u, v) if x is not None]
    grad_v = None if v is None else grads[1]
    _call(
        'affine_act_grads', u, relu, in_format_of(u, grad), u, v, a, b, c, scale, shift, shift_v, grads[0], grad_v)
    return grads


def _call_coefficients(
        name: str, args: Any, pixels: int, grads: Sequence[Optional[Tensor]], results: Sequence[Optional[Tensor]],
) -> None:
    *inputs, eps, channels = args
    hidden, features = inputs[3].shape
    sizes = *inputs[0].shape, features, hidden, len(channels), torch.get_num_threads(), pixels, *channels
    getattr(_library(inputs[0].dtype), name)(
        ctypes.c_double(eps), (ctypes.c_int64 * len(sizes))(*sizes), _addresses(*inputs, *grads), _addresses(*results))


def coefficients(*args: Any) -> List[Tensor]:
    mean, other = args[0], args[2]
    coefs = sums_like(mean, 2 if other is None else 3)
    stats = mean.new_empty(2, mean.shape[1])
    _call_coefficients('coefficients', args, 0, (), (*_three(coefs), stats))
    return [coefs, stats]


def coefficients_backward(grads: Tensor, pixels: int, *args: Any) -> List[Tensor]:
    of_maps = torch.empty_like(grads)
    of_parameters = [torch.zeros_like(x) for x in args[3:7]]
    _call_coefficients('coefficients_backward', args, pixels, _three(grads), (*_three(of_maps), *of_parameters))
    return [of_maps, *of_parameters]


def _three(x: Tensor) -> Sequence[Optional[Tensor]]:
    return x.unbind() if len(x) == 3 else (*x.unbind(), None)
