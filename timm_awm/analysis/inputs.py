"""The images of an analysis, read by timm."""
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple, Union

import numpy as np
import torch
from timm.data import create_dataset, create_transform, resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm


class ImageData:
    """Batches of a split, with the model's own preprocessing. Can be iterated many times.

    Args:
        model: Says how images are prepared, and the number of classes.
        dataset, split, input_key, target_key: As for `timm.data.create_dataset`: image folders if there is no dataset.
            Streamed data sets cannot be read.
        data_dir: Root of the data set.
        num_images: How many to draw at random; all if not given.
        batch_size, workers: As for `torch.utils.data.DataLoader`.

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
            workers: int = 0,
    ) -> None:
        self.split = split
        self.num_classes = model.num_classes
        self.config = resolve_input_data_config(model)
        try:
            images: Any = create_dataset(
                dataset, root=data_dir and str(data_dir), split=split, input_key=input_key, target_key=target_key,
                input_img_mode='RGB' if self.config['input_size'][0] == 3 else 'L')
            images[0]
            root = getattr(getattr(images, 'reader', None), 'root', None)
            if not dataset and str(root) == str(data_dir) and {'train', 'val', 'validation'} & set(os.listdir(root)):
                raise FileNotFoundError('there is no such folder')  # timm would read all of them
        except ModuleNotFoundError:
            raise
        except Exception as error:  # readers raise errors of all kinds
            columns = ''
            with suppress(Exception):  # the first error is the one to tell
                if dataset.startswith('hfds/'):
                    import datasets
                    found = datasets.load_dataset(dataset.removeprefix('hfds/'), split=split, cache_dir=data_dir)
                    columns = f' The columns are: {", ".join(found.column_names)}.'
            raise ValueError(
                f'The split {split!r} cannot be read ({type(error).__name__}: {error}). What is read is said by '
                '--dataset, --data-dir, --split, --train-split, --input-key and --target-key, as for validate.py.'
                f'{columns}') from error
        names = getattr(getattr(images, 'reader', images), 'class_to_idx', None) or {}
        self.class_names = {index: str(name) for name, index in names.items()}
        images.transform = create_transform(**self.config)
        self.indices = np.arange(len(images))  # places of the images in the data set
        if num_images:
            drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
            self.indices = drawn.sort().values.numpy()
            images = Subset(images, self.indices.tolist())
        self.loader = DataLoader(images, batch_size, num_workers=workers)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, labels in tqdm(self.loader, desc=self.split, unit='batch', mininterval=0.5):
            if labels.ndim != 1 or labels.max() >= self.num_classes:
                raise ValueError(
                    f'The model has {self.num_classes} classes, and the data have others: analyze it on its own data.')
            yield images, labels
