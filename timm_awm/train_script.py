"""Changes to timm, made only inside its train.py (`--device-modules timm_awm`): the epoch for the optimizer, the phase
for the summary, the crop mode 'pad4', DDP in phases, and new random numbers for a resumed run.
"""
import functools
import inspect
import sys
from types import ModuleType
from typing import Any, Callable, Optional

import numpy as np
import timm
import timm.task
import torch
from timm.data import transforms_factory
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.utils import random_seed
from torchvision import transforms

from . import optim


def install() -> None:
    """Replaces functions of timm if its train.py is the running script."""
    main: Any = sys.modules['__main__']
    if not _is_train_script(main):
        return
    _wrap(main, 'train_one_epoch', _with_epoch)
    _wrap(transforms_factory, 'transforms_imagenet_train', _with_pad4)
    for task in list(vars(timm.task).values()):
        if inspect.isclass(task) and 'prepare_distributed' in vars(task):
            _wrap(task, 'prepare_distributed', _with_unused_parameters)


def _is_train_script(module: ModuleType) -> bool:
    """Whether a module is timm's train.py with a `train_one_epoch(epoch, ...)`."""
    train_one_epoch = getattr(module, 'train_one_epoch', None)
    return (
        getattr(module, 'create_optimizer_v2', None) is timm.optim.create_optimizer_v2
        and inspect.isfunction(train_one_epoch)
        and list(inspect.signature(train_one_epoch).parameters)[:1] == ['epoch']
    )


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    function = getattr(owner, name)
    setattr(owner, name, functools.wraps(function)(wrapper(function)))


def _with_epoch(train_one_epoch: Callable) -> Callable:
    started = False

    def with_epoch(epoch: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal started
        if epoch and not started:  # resumed: with --seed alone it would repeat the batches of its first epochs.
            # hashed, as seed + epoch would give seed 0 at epoch 10 what seed 1 had at epoch 9
            random_seed(int(np.random.SeedSequence([torch.initial_seed(), epoch]).generate_state(1)[0]))
        started = True
        optim.set_epoch(epoch)
        metrics = train_one_epoch(epoch, *args, **kwargs)
        if isinstance(metrics, dict):
            for optimizer in optim.live():
                metrics['phase'] = optimizer.phase  # train_phase in summary.csv
        return metrics

    return with_epoch


def _with_pad4(transforms_imagenet_train: Callable) -> Callable:
    """The paper's crop for training: resize, pad by 4 zeros, crop at random. An integer is the side of a square."""

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
        steps[:1] = transforms.Resize(size), transforms.RandomCrop(size, padding=4)
        return result

    return with_pad4


def _with_unused_parameters(prepare_distributed: Callable) -> Callable:
    """Without find_unused_parameters DDP waits for the gradients of the frozen side."""

    def with_unused_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(optimizer.schedule.period for optimizer in optim.live()):
            kwargs['find_unused_parameters'] = True
        return prepare_distributed(self, *args, **kwargs)

    return with_unused_parameters
