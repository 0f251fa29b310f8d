"""The one file that changes anything in timm, and only where timm's train.py is the running script.

`install()` runs when timm_awm is imported. In train.py (`--device-modules timm_awm`) it tells the optimizer which epoch
starts and the summary which phase it was, adds the crop mode `pad4`, and lets several processes train in phases.
"""
import functools
import inspect
import sys
from types import ModuleType
from typing import Any, Callable, Iterable, Optional

import timm.optim
import timm.task
from timm.data import transforms_factory
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from . import optim

__all__ = ['install']


def install() -> None:
    """Wraps what train.py calls, once; does nothing in other scripts."""
    main = sys.modules['__main__']
    if not _is_timm_train_script(main):
        return
    _wrap(main, 'train_one_epoch', _with_epoch_clock)
    _wrap(transforms_factory, 'transforms_imagenet_train', _with_pad4)
    for task in vars(timm.task).values():
        if 'prepare_distributed' in getattr(task, '__dict__', ()):
            _wrap(task, 'prepare_distributed', _with_unused_parameters)


def _is_timm_train_script(module: ModuleType) -> bool:
    """Whether a module is timm's train.py with the `train_one_epoch(epoch, ...)` of the versions we know."""
    train_one_epoch = getattr(module, 'train_one_epoch', None)
    return (
        getattr(module, 'create_optimizer_v2', None) is timm.optim.create_optimizer_v2
        and inspect.isfunction(train_one_epoch)
        and list(inspect.signature(train_one_epoch).parameters)[:1] == ['epoch']
    )


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    function = getattr(owner, name)
    if not hasattr(function, '_wrapped_by_timm_awm'):  # if this file is loaded again
        wrapped: Any = functools.wraps(function)(wrapper(function))
        wrapped._wrapped_by_timm_awm = True
        setattr(owner, name, wrapped)


def _with_epoch_clock(train_one_epoch: Callable) -> Callable:
    def with_epoch_clock(epoch: int, *args: Any, **kwargs: Any) -> Any:
        optim.set_epoch(epoch)
        metrics = train_one_epoch(epoch, *args, **kwargs)
        if isinstance(metrics, dict):
            for optimizer in optim.live():
                metrics['phase'] = optimizer.phase  # train_phase in summary.csv
        return metrics

    return with_epoch_clock


def _with_pad4(transforms_imagenet_train: Callable) -> Callable:
    """Adds the paper's crop, zero-pad 4 and crop at random, as `--train-crop-mode pad4`; timm has none like it."""
    def with_pad4(img_size: Any = 224, *args: Any, train_crop_mode: Optional[str] = None, **kwargs: Any) -> Any:
        if train_crop_mode != 'pad4':
            return transforms_imagenet_train(img_size, *args, train_crop_mode=train_crop_mode, **kwargs)
        result = transforms_imagenet_train(img_size, *args, train_crop_mode='rrc', **kwargs)
        steps = (result[0] if isinstance(result, tuple) else result).transforms
        if not isinstance(steps[0], RandomResizedCropAndInterpolation):
            raise RuntimeError(
                f'train_crop_mode pad4 cannot replace the first transform of timm {timm.__version__}, {steps[0]!r}: '
                'use one of the timm versions that timm_awm was tested with.')
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        steps[:1] = [transforms.Resize(size), transforms.RandomCrop(size, padding=4)]
        return result

    return with_pad4


def _with_unused_parameters(prepare_distributed: Callable) -> Callable:
    """Where timm wraps a model in DDP: DDP waits for the gradients of a frozen side, unless it may look for unused
    parameters."""
    def with_unused_parameters(self: Any, device_ids: Optional[Iterable[Any]] = None, **ddp_kwargs: Any) -> Any:
        if any(optimizer.schedule.period for optimizer in optim.live()):
            ddp_kwargs['find_unused_parameters'] = True
        return prepare_distributed(self, device_ids=device_ids, **ddp_kwargs)

    return with_unused_parameters
