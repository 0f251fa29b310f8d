"""The fused merge on CPUs, in C++.

The source is compiled when it is first used, by what torch.compile's own C++ backend uses: half a minute for each type
of maps, which are float32, bfloat16 or float64. Then it lies in torch's cache.
"""
import ctypes
import functools
import logging
from importlib.resources import files
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .mixing import wide_dtype
from .operands import Operands
from .torch_private import load_cpp

_logger = logging.getLogger(__name__)

_TYPES = {torch.float32: 'float', torch.bfloat16: 'bfloat16', torch.float64: 'double'}


@functools.lru_cache(maxsize=None)
def _library(dtype: torch.dtype) -> Optional[ctypes.CDLL]:
    try:
        wide = 'double' if dtype == torch.float64 else 'float'
        source = files(__package__).joinpath('cpu.cpp').read_text(encoding='utf-8')
        return load_cpp(
            f'#define MAP {_TYPES[dtype]}\n#define WIDE {wide}\n{source}',
            before_build=lambda: _logger.warning(
                f'timm_awm builds its fused merge, once for {dtype}: about half a minute. TIMM_AWM_FUSED=0 does '
                'without.'))
    except Exception as error:  # of the compiler's set-up, of any kind
        _logger.warning(
            'The fused merges could not be built, so the plain formula is used, which is slower. They need g++ or '
            "clang, and torch's cache (TORCHINDUCTOR_CACHE_DIR) at a path without spaces. TIMM_AWM_FUSED=0 silences "
            f'this. {type(error).__name__}: ...{str(error).strip()[-300:]}')
        return None


def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for maps of this dtype; logs once if they cannot be built."""
    return dtype in _TYPES and _library(dtype) is not None


def merge(operands: Operands, overwrite: bool = False) -> Tuple[Tensor, Tensor, Tensor]:
    """act(a · u + b · v + c), the coefficients a, b and c inferred from all maps; overwrite writes a sum over u.

    Returns:
        The merged map; what `merge_backward` needs, (6, batch, channels); the batch's mean and variance, (2, channels),
        undefined if BatchNorm has running ones.
    """
    maps = _dense(operands, operands.maps)
    y = maps[0] if overwrite else _new_map(operands)
    saved = y.new_empty((6, *y.shape[:2]), dtype=wide_dtype(y))
    stats = saved.new_empty(2, y.shape[1])
    _call('merge', operands, (None, None, *maps), (saved, y, stats))
    return y, saved, stats


def merge_backward(grad: Tensor, saved: Tensor, operands: Operands) -> Tuple[Any, ...]:
    """The gradients of u, v (None without v), weight1, weight2, gamma and beta, from that of the result."""
    grad, *maps = _dense(operands, (grad.resolve_neg(), *operands.maps))
    of_maps = _new_map(operands), _new_map(operands) if operands.is_sum else None
    parameters = operands.weight1, operands.weight2, operands.gamma, operands.beta
    of_parameters = [x.new_zeros(x.shape) for x in parameters]
    _call('merge_backward', operands, (saved, grad, *maps), (*of_maps, *of_parameters))
    return *of_maps, *of_parameters


def _memory_format(o: Operands) -> torch.memory_format:
    """The memory format of the first map, or that which it is a part of."""
    first = o.maps[0]
    return torch.contiguous_format if first.is_contiguous() or first.stride(1) != 1 else torch.channels_last


def _dense(o: Operands, maps: Sequence[Tensor]) -> List[Tensor]:
    return [x.contiguous(memory_format=_memory_format(o)) for x in maps]


def _new_map(o: Operands) -> Tensor:
    """Memory for the result."""
    first = o.maps[0]
    size = len(first), len(o.gamma), *first.shape[2:]
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=_memory_format(o))


def _call(name: str, o: Operands, more: Sequence[Optional[Tensor]], results: Sequence[Optional[Tensor]]) -> None:
    """Calls the library's function with the operands and more tensors, the maps last."""
    first, channels = o.maps[0], o.channels()
    pixels = first.shape[2] * first.shape[3]
    parameters = o.weight1, o.weight2, o.gamma, o.beta, o.running_mean, o.running_var
    inputs = [*[x if x is None else x.contiguous() for x in parameters], *more]
    sizes = (
        len(first), len(o.gamma), pixels, pixels == 1 or _memory_format(o) == torch.channels_last,
        torch.get_num_threads(), o.relu, o.is_sum, len(o.weight1), len(channels), *channels)
    getattr(_library(first.dtype), name)(
        ctypes.c_double(o.eps), (ctypes.c_int64 * len(sizes))(*sizes), _addresses(inputs), _addresses(results))


def _addresses(tensors: Sequence[Any]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])
