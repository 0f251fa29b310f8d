"""The models and the data of an analysis, made by timm. Arguments are those of `timm-awm analyze`."""
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Iterator, Optional, Tuple

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


def create_model(args: Namespace, name: str, checkpoint: Optional[str] = None) -> nn.Module:
    """A model with trained merges, from a checkpoint or with its own weights.

    Raises:
        FileNotFoundError: The checkpoint is not there.
        ValueError: The model cannot be made, has no merges, or untrained ones.
    """
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'There is no checkpoint {checkpoint!r}.')
    create = partial(timm.create_model, name, num_classes=args.num_classes, **args.model_kwargs)
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
        args: Those of the data.
        model: Says how images are prepared, and the number of classes.
        split: Name of the split.
        title: Of the progress bar.
        batch_size: Instead of that of args.

    Raises:
        ValueError: The data cannot be read. When iterated: a label is no class of the model.
    """

    def __init__(self, args: Namespace, model: nn.Module, split: str, title: str, batch_size: int = 0) -> None:
        self.title = title
        self.num_classes = model.num_classes
        self.config = resolve_input_data_config(model)
        try:
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                input_key=args.input_key,
                target_key=args.target_key,
                input_img_mode='RGB' if self.config['input_size'][0] == 3 else 'L',
            )
            streamed = isinstance(dataset, IterableDataset)
            if not streamed:
                dataset[0]
        except Exception as error:  # readers raise errors of all kinds
            raise ValueError(
                f'The split {split!r} cannot be read ({type(error).__name__}: {error}). What is read is said by '
                '--dataset, --data-dir, --split, --train-split, --input-key and --target-key, as for validate.py.'
            ) from error
        names = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}
        self.class_names = {index: str(name) for name, index in names.items()}
        dataset.transform = create_transform(**self.config)
        if streamed:
            if args.num_images:
                raise ValueError('Images cannot be drawn from a streamed data set: leave --num-images out.')
            dataset.set_loader_cfg(num_workers=args.workers)
        elif args.num_images:
            drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:args.num_images]
            dataset = Subset(dataset, drawn.sort().values.tolist())
        self.loader = DataLoader(dataset, batch_size or args.batch_size, num_workers=args.workers)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, labels in tqdm(self.loader, desc=self.title, unit='batch', mininterval=0.5):
            if labels.ndim != 1 or labels.max() >= self.num_classes:
                raise ValueError(
                    f'The model has {self.num_classes} classes, and the data have others: analyze it on its own data, '
                    'or give the number of classes of a checkpoint with --num-classes.')
            yield images, labels

    def class_name(self, label: int) -> str:
        return self.class_names.get(label, str(label))

    def indices(self, count: int) -> np.ndarray:
        """Places of the images in the data set."""
        return np.asarray(getattr(self.loader.dataset, 'indices', range(count)))
