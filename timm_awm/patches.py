"""The one file that changes anything in timm.

`install()` runs when timm_awm is imported. It registers the optimizer, adds the crop mode 'pad4', takes data from a
local folder or says that it is missing, lets several processes train in phases, and, when timm's train.py is what
imports the plugin (`--device-modules timm_awm`), tells the optimizer which epoch starts and the summary which phase it
was.
"""
import functools
import inspect
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterable, Optional

import timm
import timm.data
import timm.task
import torch
import torch.multiprocessing as multiprocessing
from timm.data import transforms_factory
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torchvision import transforms

from . import optim

__all__ = ['install']

_logger = logging.getLogger(__name__)


def install() -> None:
    default_registry.register(OptimInfo(
        name='alternating',  # no underscore: timm's factory drops what stands before one
        opt_class=optim.Alternating,
        description='Trains backbone and AWM merges in turn with any other optimizer (base=..., period=...)',
        has_eps=True,
        has_momentum=True,
        has_betas=True,
    ))
    transforms_factory.transforms_imagenet_train = _with_pad4(transforms_factory.transforms_imagenet_train)
    timm.data.create_dataset = _with_local_data(timm.data.create_dataset)
    tasks: Any = [task for task in vars(timm.task).values() if 'prepare_distributed' in getattr(task, '__dict__', ())]
    for task in tasks:
        task.prepare_distributed = _with_own_ddp(task.prepare_distributed)
    hook_train_script()


def hook_train_script() -> None:
    """Replaces two functions of timm's train.py, if that is the running script."""
    main: Any = sys.modules['__main__']
    if _is_timm_train_script(main):
        main.train_one_epoch = _with_epoch_clock(main.train_one_epoch)
        main.create_dataset = timm.data.create_dataset


def _with_pad4(transforms_imagenet_train):
    """Adds the paper's crop, zero-pad 4 and crop at random, as `--train-crop-mode pad4`; timm has none like it."""

    @functools.wraps(transforms_imagenet_train)
    def with_pad4(img_size: Any = 224, *args: Any, train_crop_mode: Optional[str] = None, **kwargs: Any):
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


def _is_timm_train_script(module: ModuleType) -> bool:
    """Whether a module is timm's train.py with the `train_one_epoch(epoch, ...)` of the versions we know."""
    train_one_epoch = getattr(module, 'train_one_epoch', None)
    return (
        getattr(module, 'create_optimizer_v2', None) is timm.optim.create_optimizer_v2
        and inspect.isfunction(train_one_epoch)
        and list(inspect.signature(train_one_epoch).parameters)[:1] == ['epoch']
    )


def _with_epoch_clock(train_one_epoch):
    @functools.wraps(train_one_epoch)
    def with_epoch_clock(epoch: int, *args: Any, **kwargs: Any):
        optim.set_epoch(epoch)
        metrics = train_one_epoch(epoch, *args, **kwargs)
        for optimizer in optim.live():
            metrics['phase'] = optimizer.phase  # train_phase in summary.csv
        return metrics

    return with_epoch_clock


def _with_own_ddp(prepare_distributed):
    """Where timm wraps a model in DDP: DDP waits for the gradients of a frozen side, unless it may look for unused
    parameters. On a CPU, where timm does not use it, DDP takes no `device_ids`, and loaders must not fork: a thread of
    gloo may hold a lock of Python's just then, for which the worker would wait for ever."""

    @functools.wraps(prepare_distributed)
    def with_own_ddp(self, device_ids: Optional[Iterable[Any]] = None, **ddp_kwargs: Any):
        if any(torch.device(device).type == 'cpu' for device in device_ids or ()):
            device_ids = None
            if multiprocessing.get_start_method() == 'fork':
                multiprocessing.set_start_method('forkserver', force=True)
                _logger.info('DDP on a CPU: data loaders start their workers by forkserver, not by fork.')
        if any(optimizer.schedule.period for optimizer in optim.live()):
            ddp_kwargs['find_unused_parameters'] = True
        return prepare_distributed(self, device_ids=device_ids, **ddp_kwargs)

    return with_own_ddp


def _with_local_data(create_dataset):
    """Lets a recipe for a data set of the Hub read a copy on disk, named by `--data-dir`: Parquet files, or images in
    class folders. And names the folder that is not there, where timm stops at a bare assert."""

    @functools.wraps(create_dataset)
    def with_local_data(
            name: str, root: Optional[str] = None, split: str = 'validation', *args: Any, **kwargs: Any):
        if name.startswith('hfds/') and root:
            _require_folder(root)
            train = Path(root, 'train')
            if train.is_dir() and not any(train.glob('*.parquet')):
                name, root = '', _split_folder(root, split)
                kwargs = {key: value for key, value in kwargs.items() if key not in ('input_key', 'target_key')}
            elif any(Path(root).rglob('*.parquet')):
                name, root = f'hfds/{os.path.abspath(root)}', None
            else:
                _logger.info(f'{root} holds neither Parquet files nor a folder train: it is the cache for {name}.')
        kind, _, place = name.partition('/')
        if not place:  # a folder of images; other kinds may create theirs
            _require_folder(root)
        elif kind == 'hfds' and (place.startswith(('/', '.')) or place.count('/') > 1):  # no repository of the Hub
            _require_folder(place)
        return create_dataset(name, root, split, *args, **kwargs)

    return with_local_data


def _split_folder(root: str, split: str) -> str:
    """The folder of a split; timm would take the root, with the training images in it, if there were none."""
    if '[' in split:
        raise ValueError(
            f'The folders of images in {root} cannot be sliced as {split!r} asks: give the Parquet files of the data '
            'set, or leave the data on the Hub, or name whole folders with --train-split and --val-split.')
    names = [split] if split == 'train' else [split, 'val', 'validation', 'test']
    folders = [folder for folder in (os.path.join(root, name) for name in names) if os.path.isdir(folder)]
    if not folders:
        raise FileNotFoundError(
            f'{root} has no folder {split!r} of images: name one with --train-split or --val-split.')
    return folders[0]


def _require_folder(folder: Optional[str]) -> None:
    if not folder or not os.path.exists(folder):
        raise FileNotFoundError(
            f'The data folder {folder!r} does not exist. Give a folder of images, one subfolder a class, with '
            '--data-dir, or a folder of Parquet files as the Hugging Face Hub has them with --dataset hfds/FOLDER.')
