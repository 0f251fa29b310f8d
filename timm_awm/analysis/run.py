"""The work of `timm-awm analyze`: every question for every model, on a data set, image by image."""
import csv
import json
import math
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn

from .. import __version__
from ..hub.folder import REFERENCE
from ..hub.run import data_name
from ..utils import find_device, new_folder
from .ablation import Ablation, ablate, plot_ablations
from .discriminant import (
    COMPONENTS,
    PIXEL_BATCH,
    as_features,
    cumulative_match,
    plot_cumulative_matches,
    reduce_pixels,
)
from .inputs import ImageData, create_model
from .observe import Observed, observe
from .profile import (
    between_class_share,
    class_means,
    plot_class_means,
    plot_path_profile,
    plot_profiles,
    profile,
)
from .ranking import save_ranking
from .reference import write_reference

__all__ = ['analyze', 'model_labels']


class _Analysis:
    """What is found, of all models by their labels."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.rows: List[Dict[str, Any]] = []  # of profile.csv
        self.summaries: Dict[str, Dict[str, Any]] = {}
        self.residual: Dict[str, Dict[str, Tensor]] = {}  # λ of the ResNets
        self.ablations: Dict[str, Ablation] = {}
        self.matches: Dict[str, np.ndarray] = {}
        self.pixels: Dict[str, np.ndarray] = {}  # by how images are prepared, for models that share it

    def add(self, label: str, model: nn.Module, folder: Path) -> None:
        args = self.args
        folder.mkdir()
        data = ImageData(args, model, args.split, f'{label}, {args.split}')
        seen = observe(model, data)
        labels = seen.labels.numpy()
        summary = self.summaries[label] = dict(images=len(labels), merges=len(seen.lambdas))
        if seen.labelled:
            classes = len(np.unique(labels))
            summary.update(
                classes=classes,
                top1=100 * float((seen.labels == seen.predictions).double().mean()),
                between_class_share=_share(torch.cat(list(seen.lambdas.values()), dim=1), labels),
                between_class_share_by_chance=(classes - 1) / (len(labels) - 1),
            )
            _save_class_means(folder, label, seen, data)
        for name, (mean, std) in profile(seen.lambdas).items():
            self.rows += [
                dict(model=label, merge=name, paths=len(mean), path=i + 1, mean=float(mean[i]), std=float(std[i]),
                     between_class_share=_share(seen.lambdas[name][:, i:i + 1], labels) if seen.labelled else None)
                for i in range(len(mean))]
        write_reference(folder, seen, f'{data_name(vars(args))[0]}, {args.split}')
        arrays: Dict[str, Any] = {name: value.numpy() for name, value in seen.lambdas.items()}
        arrays.update(index=data.indices(len(labels)), label=labels, prediction=seen.predictions.numpy())
        np.savez_compressed(folder / 'lambda.npz', **arrays)
        if seen.residual:
            self.residual[label] = seen.lambdas
            summary.update(save_ranking(folder, label, seen, data))
        else:
            plot_path_profile(seen.lambdas, label).savefig(folder / 'profile.png', dpi=120)
        if args.ablation and seen.labelled:
            data.title = f'{label}, merges held constant'
            ablation = self.ablations[label] = ablate(model, data, seen.lambdas)
            summary['ablation'] = ablation._asdict()
        if args.train_split:
            if not seen.labelled:
                raise ValueError('PCA and LDA need labels of two classes or more: leave --train-split out.')
            summary['cumulative_match'] = self._match(label, model, seen)
        print(_line(label, summary))

    def _match(self, label: str, model: nn.Module, seen: Observed) -> Dict[str, Any]:
        """What PCA and LDA tell of the class, from λ and from pixels."""
        args = self.args
        train_data = ImageData(args, model, args.train_split, f'{label}, {args.train_split}')
        train = observe(model, train_data)
        labels = train.labels.numpy(), seen.labels.numpy()

        def match(of_train: np.ndarray, of_test: np.ndarray) -> np.ndarray:
            return cumulative_match(of_train, labels[0], of_test, labels[1])

        features = as_features(train.lambdas)
        curve = match(features, as_features(seen.lambdas))
        prepared = str(train_data.config)
        if prepared not in self.pixels:
            batch_size = max(args.batch_size, PIXEL_BATCH)
            of_train, of_test = (
                ImageData(args, model, split, f'pixels, {split}', batch_size)
                for split in (args.train_split, args.split))
            self.pixels[prepared] = match(*reduce_pixels(of_train, of_test, min(COMPONENTS, len(train.labels))))
        pixels = self.pixels[prepared]
        self.matches[f'{features.shape[1]} λ of {label}'] = curve
        self.matches[f'{math.prod(train_data.config["input_size"]):,} pixels'] = pixels
        return dict(
            train_images=len(train.labels), mixing_weights=curve.tolist(), pixels=pixels.tolist(),
            mean_difference=float((curve - pixels).mean()))

    def save(self, output: Path) -> None:
        """What is about all models."""
        with (output / 'profile.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        settings = {k: v for k, v in vars(self.args).items() if k not in ('command', 'output')}
        record = dict(
            models=self.summaries, settings=settings, timm_awm=__version__, timm=timm.__version__,
            torch=torch.__version__)
        (output / 'summary.json').write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding='utf-8')
        if self.residual:
            plot_profiles(self.residual).savefig(output / 'profile.png', dpi=120)
        if self.ablations:
            plot_ablations(self.ablations).savefig(output / 'ablation.png', dpi=120)
        if self.matches:
            plot_cumulative_matches(self.matches).savefig(output / 'cumulative-match.png', dpi=120)


def analyze(args: Namespace) -> None:
    """Analyse models on a data set, and leave arrays, tables and figures in a folder.

    Args:
        args: Those of `timm-awm analyze`, whose help explains them. The output folder is new, and appears when
            everything in it is complete.

    Raises:
        FileExistsError: The output folder exists.
        FileNotFoundError: A checkpoint is not there.
        ValueError: A model has no merges or untrained ones, or the data cannot be read or do not fit.
    """
    if args.checkpoint and len(args.checkpoint) != len(args.models):
        raise ValueError(f'{len(args.checkpoint)} checkpoints for {len(args.models)} models: give one for each.')
    device = find_device(args.device)
    checkpoints: Sequence[Optional[str]] = args.checkpoint or [None] * len(args.models)
    with new_folder(args.output) as partial:
        # all of them, before hours go into the first
        models = [create_model(args, name, checkpoint) for name, checkpoint in zip(args.models, checkpoints)]
        found = _Analysis(args)
        for label, model in zip(model_labels(args.models, checkpoints), models):
            found.add(label, model.to(device), partial / label)
            model.cpu()
        found.save(partial)
    for name, label, checkpoint in zip(args.models, model_labels(args.models, checkpoints), checkpoints):
        if name.startswith('local-dir:') and not checkpoint and not args.num_images:
            # for `timm-awm explore`, and for who gets the folder; a sample is not worth it
            goal = Path(name.removeprefix('local-dir:')) / REFERENCE
            shutil.copyfile(args.output / label / REFERENCE, goal)
            print(f'{goal}: what timm-awm explore compares a picture with.')
    print(f'Everything is in {args.output}.')


def model_labels(models: Sequence[str], checkpoints: Sequence[Optional[str]]) -> List[str]:
    """Names for folders and legends, each different: the last part of the model's, and the run of its checkpoint."""
    labels: List[str] = []
    for model, checkpoint in zip(models, checkpoints):
        base = re.split(r'[:/\\]', model.rstrip('/\\'))[-1]
        if checkpoint:
            base += f'-{Path(checkpoint).resolve().parent.name}'
        label, n = base, 1
        while label in labels:
            n += 1
            label = f'{base}-{n}'
        labels.append(label)
    return labels


def _save_class_means(folder: Path, label: str, seen: Observed, data: ImageData) -> None:
    """classes.csv and its picture: a row for each class, a column for each λ."""
    values = torch.cat(list(seen.lambdas.values()), dim=1).numpy()
    classes, counts, means = class_means(values, seen.labels.numpy())
    names = [data.class_name(index) for index in classes.tolist()]
    columns = [f'{name}:{path + 1}' for name, value in seen.lambdas.items() for path in range(value.shape[1])]
    with (folder / 'classes.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['class', 'images', *columns])
        writer.writerows([name, count, *row] for name, count, row in zip(names, counts.tolist(), means.tolist()))
    plot_class_means(means, names, seen.lambdas, label).savefig(folder / 'classes.png', dpi=120)


def _share(values: Tensor, labels: np.ndarray) -> Optional[float]:
    share = between_class_share(values.numpy(), labels)
    return None if math.isnan(share) else share  # JSON has no NaN


def _line(label: str, summary: Mapping[str, Any]) -> str:
    parts = [f'{summary["images"]:,} images']
    if 'top1' in summary:
        parts.append(f'top-1 {summary["top1"]:.2f} %')
    if 'ablation' in summary:
        parts.append(f'{summary["ablation"]["constant"]:.2f} % with every lambda at its mean')
        parts.append(f'{summary["ablation"]["all"]:.2f} % with all merges at the identity')
    if summary.get('between_class_share') is not None:
        parts.append(f'{summary["between_class_share"]:.1%} of the variance of lambda between classes (by chance '
                     f'{summary["between_class_share_by_chance"]:.1%})')
    if 'cumulative_match' in summary:
        match = summary['cumulative_match']
        parts.append(f'rank 1 by lambda {match["mixing_weights"][0]:.2f} %, by pixels {match["pixels"][0]:.2f} %')
    return f'{label}: {", ".join(parts)}'
