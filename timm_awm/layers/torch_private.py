"""Names of torch that are not public, for there are no others. tests/test_fused.py fails where one has changed."""
import ctypes
import logging
from typing import Any, Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def is_intercepted() -> bool:
    """Whether torch.func, forward-mode derivatives, hooks on all modules of the process, or a mode that sees or changes
    functions are at work. A default device only changes how tensors are made."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
        or torch._C._len_torch_dispatch_stack()
        or any([type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()]))


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has memory of its own to read, as a batch of gradients under torch's vmap has not."""
    return type(x) is Tensor and torch._C._has_storage(x)


def is_exactly(module: Any, cls: Any) -> bool:
    """Whether a module is of this class, and nothing hangs on its call."""
    return type(module) is cls and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or module._compiled_call_impl is not None or 'forward' in module.__dict__)


def load_cpp(source: str, before_build: Callable[[], None]) -> ctypes.CDLL:
    """Compiles C++ as torch.compile does, or takes it from torch's cache; else before_build is called."""
    log = logging.getLogger('torch.utils.cpp_extension')  # warns of CUDA_HOME where there is no GPU
    disabled, log.disabled = log.disabled, True
    try:
        from torch._inductor.codecache import CppCodeCache
        return CppCodeCache.load_async(source, submit_fn=lambda worker: before_build())()
    finally:
        log.disabled = disabled
