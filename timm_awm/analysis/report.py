"""The work of `timm-awm analyze`: every question for every model, on a data set, image by image."""
import csv
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np
import timm
import torch
from torch import Tensor, nn

from .. import __version__
from ..hub.folder import REFERENCE
from ..hub.training_run import data_name
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
from .names import is_own_folder, resolve_models, timm_name
from .observed import Observed, observe
from .profile import between_class_share, plot_paths, plot_profiles, profile_merges
from .ranking import save_ranking
from .reference import write_reference

__all__ = ['analyze']


def analyze(
        models: Sequence[str],
        checkpoint: Sequence[str] = (),
        num_classes: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        split: str = 'validation',
        train_split: Optional[str] = None,
        ablation: bool = True,
        device: Optional[str] = None,
        output: Union[str, Path] = 'timm-awm-analysis',
        **data: Any,
) -> Dict[str, Dict[str, Any]]:
    """Analyse models on a data set, and leave arrays, tables and figures in a folder.

    Args:
        models: AWM models, as for `resolve_models`.
        checkpoint: Files of train.py, one for each model; the models' own weights if not given.
        num_classes, model_kwargs: As for `create_model`.
        split: The split to analyse.
        train_split: The split to fit PCA and LDA on; both are left out if it is not given.
        ablation: Set each merge back to the identity, and all.
        device: An accelerator if there is one, else the CPU, if not given.
        output: New folder, which appears when everything in it is complete.
        **data: As for `ImageData`: dataset, data_dir, input_key, target_key, num_images, batch_size, workers.

    Returns:
        Label of the model -> what summary.json has of it.

    Raises:
        FileExistsError: The output folder exists.
        FileNotFoundError: A checkpoint is not there.
        RuntimeError: The Hub cannot be reached.
        ValueError: A model has no merges or untrained ones, or the data cannot be read or do not fit.
    """
    settings = {key: value for key, value in {**locals(), **data}.items() if key not in ('data', 'output')}
    if checkpoint and len(checkpoint) != len(models):
        raise ValueError(f'{len(checkpoint)} checkpoints for {len(models)} models: give one for each.')
    output, on = Path(output), find_device(device)
    found = _Found(f'{data_name(data)[0]}, {split}', ablation)
    with new_folder(output) as partial, tempfile.TemporaryDirectory() as temporary:
        sources = resolve_models(models, Path(temporary), checkpoint)
        # all models and data, before hours go into the first
        networks = [create_model(timm_name(source), file, num_classes, model_kwargs)
                    for source, file in zip(sources.values(), checkpoint or [None] * len(models))]
        splits = [[name and ImageData(network, split=name, title=f'{label}, {name}', **data)
                   for name in (split, train_split)] for label, network in zip(sources, networks)]
        for label, network, (test, train) in zip(sources, networks, splits):
            found.add(label, network.to(on), partial / label, test, train)
            network.cpu()
        found.save(partial, settings)
    for name, (label, source) in zip(models, sources.items()):
        if is_own_folder(name, source) and not checkpoint and not data.get('num_images'):
            # for `timm-awm explore`, and for who gets the folder; a sample is not worth it
            try:
                shutil.copyfile(output / label / REFERENCE, Path(source) / REFERENCE)
                print(f'{Path(source) / REFERENCE}: what timm-awm explore compares a picture with.')
            except OSError as error:
                print(f'{REFERENCE} is not copied to the model: {error}')
    print(f'Everything is in {output}.')
    return found.summaries


class _Found:
    """What is found, of all models by their labels."""

    def __init__(self, data: str, ablation: bool) -> None:
        self.data, self.ablation = data, ablation
        self.rows: List[Dict[str, Any]] = []  # of profile.csv
        self.summaries: Dict[str, Dict[str, Any]] = {}
        self.residual: Dict[str, Dict[str, Tensor]] = {}  # λ of the ResNets
        self.ablations: Dict[str, Ablation] = {}
        self.matches: Dict[str, np.ndarray] = {}
        self.pixels: Dict[str, np.ndarray] = {}  # by how images are prepared, for models that share it
        self.colors: Dict[str, str] = {}  # of a model and of its curves, in all figures

    def add(self, label: str, model: nn.Module, folder: Path, test: ImageData, train: Optional[ImageData]) -> None:
        folder.mkdir()
        self.colors[label] = f'C{len(self.summaries)}'
        seen = observe(model, test)
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
        profiles = profile_merges(seen.lambdas)
        for name, (mean, std) in profiles.items():
            self.rows += [
                dict(model=label, merge=name, paths=len(mean), path=i + 1, mean=float(mean[i]), std=float(std[i]),
                     between_class_share=_share(seen.lambdas[name][:, i:i + 1], labels) if seen.labelled else None)
                for i in range(len(mean))]
        write_reference(folder, seen, self.data)
        np.savez_compressed(
            folder / 'lambda.npz', index=test.indices(len(labels)), label=labels, prediction=seen.predictions.numpy(),
            **{name: value.numpy() for name, value in seen.lambdas.items()})
        if seen.residual:
            self.residual[label] = seen.lambdas
            summary.update(save_ranking(folder, label, seen, test))
        else:
            means, stds = ({name: values[i] for name, values in profiles.items()} for i in (0, 1))
            plot_paths(dict(mean=means), label, stds).savefig(folder / 'profile.png', dpi=120)
        if self.ablation and seen.labelled:
            test.title = f'{label}, merges held constant'
            self.ablations[label] = ablate(model, test, seen.lambdas)
            summary['ablation'] = self.ablations[label]._asdict()
        if train:
            if not seen.labelled:
                raise ValueError('PCA and LDA need labels of two classes or more: leave --train-split out.')
            summary['cumulative_match'] = self._match(label, observe(model, train), seen, train, test)
        print(_line(label, summary))

    def _match(
            self, label: str, fitted: Observed, seen: Observed, train: ImageData, test: ImageData) -> Dict[str, Any]:
        """Finds what PCA and LDA tell of the class, from λ and from pixels."""
        labels = fitted.labels.numpy(), seen.labels.numpy()
        features = as_features(fitted.lambdas), as_features(seen.lambdas)
        curve = cumulative_match(features[0], labels[0], features[1], labels[1])
        prepared = str(train.config)
        if prepared not in self.pixels:
            components = min(COMPONENTS, len(labels[0]))
            reduced = reduce_pixels(train.in_batches(PIXEL_BATCH), test.in_batches(PIXEL_BATCH), components)
            self.pixels[prepared] = cumulative_match(reduced[0], labels[0], reduced[1], labels[1])
        pixels = self.pixels[prepared]
        names = f'{features[0].shape[1]} λ of {label}', f'{math.prod(train.config["input_size"]):,} pixels'
        self.matches.update(zip(names, (curve, pixels)))
        self.colors.update(zip(names, (self.colors[label], 'black')))
        return dict(
            train_images=len(labels[0]), mixing_weights=curve.tolist(), pixels=pixels.tolist(),
            mean_difference=float((curve - pixels).mean()))

    def save(self, output: Path, settings: Mapping[str, Any]) -> None:
        """Writes what is about all models."""
        with (output / 'profile.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        record = dict(
            models=self.summaries, settings=settings, timm_awm=__version__, timm=timm.__version__,
            torch=torch.__version__)
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (output / 'summary.json').write_text(text, encoding='utf-8', errors='replace')
        if self.residual:
            plot_profiles(self.residual, self.colors).savefig(output / 'profile.png', dpi=120)
        if self.ablations:
            plot_ablations(self.ablations, self.colors).savefig(output / 'ablation.png', dpi=120)
        if self.matches:
            plot_cumulative_matches(self.matches, self.colors).savefig(output / 'cumulative-match.png', dpi=120)


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
    return f'{label}: {", ".join(parts)}'
