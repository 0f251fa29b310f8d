"""Names of torch that are not public, for there are no others. tests/test_fused.py fails where one is gone or means
something else.
"""
import ctypes
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

__all__ = ['is_intercepted', 'is_watched', 'is_exactly', 'load_cpp']


def is_intercepted() -> bool:
    """Whether torch.func or forward-mode derivatives are at work, or hooks hang on every module of the process."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)


def is_watched() -> bool:
    """Whether a mode of torch sees, and may keep, what operators return."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def is_exactly(module: Any, cls: Any) -> bool:
    """Whether a module is of this class, and nothing hangs on its call."""
    return type(module) is cls and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or module._compiled_call_impl is not None or 'forward' in module.__dict__)


def load_cpp(source: str) -> ctypes.CDLL:
    """Compiles C++ as torch.compile does, or takes it from torch's cache."""
    from torch._inductor.codecache import CppCodeCache
    return CppCodeCache.load(source)
