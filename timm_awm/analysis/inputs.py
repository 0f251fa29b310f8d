"""The models and the data of an analysis, made by timm."""
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Tuple, Union

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.data import create_dataset, create_transform, resolve_input_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from ..layers import MixingWeights

__all__ = ['create_model', 'ImageData']


def create_model(
        name: str,
        checkpoint: Optional[str] = None,
        num_classes: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> nn.Module:
    """A model with trained merges, from a checkpoint or with its own weights.

    Args:
        name, num_classes, model_kwargs: As for `timm.create_model`.
        checkpoint: File of train.py, or of weights.

    Raises:
        FileNotFoundError: The checkpoint is not there.
        ValueError: The model cannot be made, has no merges, or untrained ones.
    """
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'There is no checkpoint {checkpoint!r}.')
    create = partial(timm.create_model, name, num_classes=num_classes, **(model_kwargs or {}))
    hint = ''
    try:
        with torch.device('meta'):  # before anything is downloaded
            if not any(isinstance(module, MixingWeights) for module in create().modules()):
                raise ValueError('there are no AWM merges in it to analyze. Name an awm_* model, without awm=False.')
        if checkpoint:
            model = create()
            load_checkpoint(model, checkpoint)
        else:
            hint = ' For trained weights of your own: --checkpoint FILE.'
            model = create(pretrained=True)
    except (AssertionError, EOFError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f'{name}: {error}{hint}') from error
    if not any(module.weight2.any() for module in model.modules() if isinstance(module, MixingWeights)):
        raise ValueError(
            f'{name}: every merge is at the identity start, lambda = 1/n for every image, so there is nothing to '
            'analyze. Take trained weights, for instance with --checkpoint FILE.')
    return model


class ImageData:
    """Batches of a split, with the model's own preprocessing. Can be iterated many times.

    Args:
        model: Says how images are prepared, and the number of classes.
        dataset, split, input_key, target_key: As for `timm.data.create_dataset`: image folders if there is no dataset.
        data_dir: Root of the data set.
        num_images: How many to draw at random; all if not given.
        batch_size, workers: As for `torch.utils.data.DataLoader`.
        title: Of the progress bar.

    Raises:
        ValueError: The data cannot be read. When iterated: a label is no class of the model.
    """

    def __init__(
            self,
            model: nn.Module,
            dataset: str = '',
            data_dir: Union[str, Path, None] = None,
            split: str = 'validation',
            input_key: Optional[str] = None,
            target_key: Optional[str] = None,
            num_images: Optional[int] = None,
            batch_size: int = 256,
            workers: int = 4,
            title: str = '',
    ) -> None:
        self.title = title
        self.num_classes = model.num_classes
        self.config = resolve_input_data_config(model)
        if not dataset and not (data_dir and Path(data_dir).exists()):
            raise ValueError(f'There is no folder {data_dir!r}: name one of images with --data-dir, or a --dataset.')
        try:
            images: Any = create_dataset(
                dataset,
                root=data_dir and str(data_dir),
                split=split,
                input_key=input_key,
                target_key=target_key,
                input_img_mode='RGB' if self.config['input_size'][0] == 3 else 'L',
            )
            streamed = isinstance(images, IterableDataset)
            if not streamed:
                images[0]
        except ModuleNotFoundError:
            raise
        except Exception as error:  # readers raise errors of all kinds
            raise ValueError(
                f'The split {split!r} cannot be read ({type(error).__name__}: {error}). What is read is said by '
                '--dataset, --data-dir, --split, --train-split, --input-key and --target-key, as for validate.py.'
                f'{_columns(dataset, data_dir, split)}') from error
        names = getattr(getattr(images, 'reader', images), 'class_to_idx', None) or {}
        self.class_names = {index: str(name) for name, index in names.items()}
        images.transform = create_transform(**self.config)
        if streamed:
            if num_images:
                raise ValueError('Images cannot be drawn from a streamed data set: leave --num-images out.')
            images.set_loader_cfg(num_workers=workers)
        elif num_images:
            drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
            images = Subset(images, drawn.sort().values.tolist())
        self.loader = DataLoader(images, batch_size, num_workers=workers)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, labels in tqdm(self.loader, desc=self.title, unit='batch', mininterval=0.5):
            if labels.ndim != 1 or labels.max() >= self.num_classes:
                raise ValueError(
                    f'The model has {self.num_classes} classes, and the data have others: analyze it on its own data, '
                    'or give the number of classes of a checkpoint with --num-classes.')
            yield images, labels

    def in_batches(self, at_least: int) -> 'ImageData':
        """The same data in batches of so many images or more."""
        other, size = copy(self), max(at_least, self.loader.batch_size or 0)
        other.loader = DataLoader(self.loader.dataset, size, num_workers=self.loader.num_workers)
        return other

    def class_name(self, label: int) -> str:
        return self.class_names.get(label, str(label))

    def indices(self, count: int) -> np.ndarray:
        """Places of the images in the data set."""
        return np.asarray(getattr(self.loader.dataset, 'indices', range(count)))


def _columns(dataset: str, data_dir: Any, split: str) -> str:
    """A sentence about the columns of a data set of Hugging Face; nothing where they cannot be read either."""
    with suppress(Exception):  # the first error is the one to tell
        if dataset.startswith('hfds/'):
            import datasets
            found = datasets.load_dataset(dataset.removeprefix('hfds/'), split=split, cache_dir=data_dir)
            return f' The columns are: {", ".join(found.column_names)}.'
    return ''
