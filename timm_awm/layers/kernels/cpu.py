"""The merge on CPUs, in C++.

The source is compiled when it is first used, by what torch.compile's own C++ backend uses: some seconds for each type
of maps, which are float32, bfloat16 or float64. Then it lies in torch's cache.
"""
import ctypes
import functools
import logging
from importlib.resources import files
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..torch_private import load_cpp
from . import empty_results, in_format_of

__all__ = ['is_available', 'merge', 'merge_backward']

_logger = logging.getLogger(__name__)

_TYPES = {torch.float32: 'float', torch.bfloat16: 'bfloat16', torch.float64: 'double'}


@functools.lru_cache(maxsize=None)
def _library(dtype: torch.dtype) -> Optional[ctypes.CDLL]:
    try:
        wide = 'double' if dtype == torch.float64 else 'float'
        source = files(__package__).joinpath('cpu.cpp').read_text(encoding='utf-8')
        return load_cpp(f'#define MAP {_TYPES[dtype]}\n#define WIDE {wide}\n{source}')
    except Exception as error:  # of the compiler's set-up, of any kind
        _logger.warning(
            'The fused merges could not be built, so the plain formula is used, which is slower. They need g++ or '
            "clang, and torch's cache (TORCHINDUCTOR_CACHE_DIR) at a path without spaces. TIMM_AWM_FUSED=0 silences "
            f'this. {type(error).__name__}: ...{str(error).strip()[-300:]}')
        return None


@torch.compiler.assume_constant_result
def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for maps of this dtype; logs once if they cannot be built."""
    return dtype in _TYPES and _library(dtype) is not None


def _addresses(tensors: Sequence[Optional[Tensor]]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])


def _call(name: str, args: Tuple[Any, ...], more: Sequence[Tensor], results: Sequence[Optional[Tensor]]) -> None:
    """Calls the library's function with the arguments of `merge` and more tensors."""
    *tensors, eps, channels, relu = args
    u, weight1 = tensors[0], tensors[2]
    sizes = (
        *u.shape[:2], u.shape[2] * u.shape[3], not u.is_contiguous(), torch.get_num_threads(), relu, len(weight1),
        len(channels), *channels)
    getattr(_library(u.dtype), name)(
        ctypes.c_double(eps), (ctypes.c_int64 * len(sizes))(*sizes), _addresses([*tensors, *more]),
        _addresses(results))


def merge(u: Tensor, *args: Any, overwrite: bool = False) -> List[Tensor]:
    y, saved, stats = empty_results(u, overwrite)
    _call('merge', (u, *args), (), (saved, y, stats))
    return [y, saved, stats]


def merge_backward(grad: Tensor, saved: Tensor, *args: Any) -> List[Tensor]:
    u, v, *parameters = args[:6]
    of_maps = [torch.empty_like(u), None if v is None else torch.empty_like(u)]
    of_parameters = [torch.zeros_like(x) for x in parameters]
    _call('merge_backward', args, (saved, in_format_of(u, grad.resolve_neg())), (*of_maps, *of_parameters))
    return [x for x in (*of_maps, *of_parameters) if x is not None]
