"""The work of `timm-awm analyze`: every question for every model, on a data set, image by image."""
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import __version__
from ..hub.folder import REFERENCE
from ..hub.training_run import data_name
from ..layers import MixingWeights
from ..utils import find_device, new_folder
from .ablation import Ablation, ablate, plot_ablations
from .discriminant import COMPONENTS, as_features, cumulative_match, plot_cumulative_matches, reduce_pixels
from .inputs import ImageData
from .names import Source, folder_of, load_model, resolve_models
from .observed import Observed, observe
from .profile import between_class_share, plot_paths, plot_profiles, profile_merges
from .ranking import save_ranking
from .reference import write_reference

__all__ = ['analyze']

PIXEL_BATCH = 256  # images: enough for the principal components to settle


def analyze(
        models: Sequence[str],
        split: str = 'validation',
        train_split: Optional[str] = None,
        ablation: bool = True,
        device: Optional[str] = None,
        output: Union[str, Path] = 'timm-awm-analysis',
        **data: Any,
) -> Dict[str, Dict[str, Any]]:
    """Analyse models on a data set, and leave arrays, JSON and figures in a folder.

    Args:
        models: AWM models, as for `resolve_models`.
        split: Split to analyse.
        train_split: Split to fit PCA and LDA on (default: leave both out).
        ablation: Set each merge back to the identity, and all.
        device: Device to run on (default: an accelerator if there is one, else the CPU).
        output: New folder, which appears when everything in it is complete.
        **data: As for `ImageData`: dataset, data_dir, input_key, target_key, num_images, batch_size, workers.

    Returns:
        Label of the model -> what summary.json has of it.

    Raises:
        FileExistsError: The output folder exists.
        ValueError: A model has no trained merges; or as `resolve_models`, `ImageData`.
    """
    settings = {key: value for key, value in {**locals(), **data}.items() if key not in ('data', 'output')}
    output, on = Path(output), find_device(device)
    found = _Found(f'{data_name(data)[0]}, {split}', ablation)
    with new_folder(output) as partial, tempfile.TemporaryDirectory() as temporary:
        sources = resolve_models(models, Path(temporary))
        prepared = []  # all models and data, before hours go into the first
        for label, source in sources.items():
            model = _load_trained(source, label)
            splits = [ImageData(model, split=part, **data) for part in (split, train_split) if part]
            prepared.append((label, model, splits))
        for label, model, splits in prepared:
            found.add(label, model.to(on), partial / label, *splits)
            model.cpu()
        found.save(partial, settings)
    for name, (label, source) in zip(models, sources.items()):
        if source == folder_of(name) and not data.get('num_images'):
            # for `timm-awm explore`, and for who gets the folder; a sample is not worth it
            try:
                shutil.copyfile(output / label / REFERENCE, Path(source) / REFERENCE)
                print(f'{Path(source) / REFERENCE}: what timm-awm explore compares a picture with.')
            except OSError as error:
                print(f'{REFERENCE} is not copied to the model: {error}')
    print(f'Everything is in {output}.')
    return found.summaries


def _load_trained(source: Source, label: str) -> nn.Module:
    model = load_model(source)
    if not any(module.weight2.any() for module in model.modules() if isinstance(module, MixingWeights)):
        raise ValueError(
            f'{label} has no AWM merges, or all are at the identity start, lambda = 1/n for every image: there is '
            'nothing to analyze. Name a run or a Hub folder of a trained AWM model.')
    return model


class _Found:
    """All findings, by the labels of the models."""

    def __init__(self, data: str, ablation: bool) -> None:
        self.data, self.ablation = data, ablation
        self.summaries: Dict[str, Dict[str, Any]] = {}
        self.residual: Dict[str, Dict[str, Tensor]] = {}  # λ of the ResNets
        self.ablations: Dict[str, Ablation] = {}
        self.matches: Dict[str, np.ndarray] = {}
        self.pixels: Dict[str, np.ndarray] = {}  # by how images are prepared, for models that share it

    def add(self, label: str, model: nn.Module, folder: Path, test: ImageData, *train: ImageData) -> None:
        folder.mkdir()
        seen = observe(model, test)
        if train and not seen.labelled:
            raise ValueError('PCA and LDA need labels of two classes or more: leave --train-split out.')
        labels = seen.labels.numpy()
        said = [f'{label}: {len(labels):,} images']
        arrays: Dict[str, Any] = {name: value.numpy() for name, value in seen.lambdas.items()}
        summary = self.summaries[label] = dict(images=len(labels), merges=len(seen.lambdas))
        if seen.labelled:
            classes = len(np.unique(labels))
            summary.update(
                classes=classes,
                top1=100 * float((seen.labels == seen.predictions).double().mean()),
                between_class_share=between_class_share(np.hstack(list(arrays.values())), labels),
                between_class_share_by_chance=(classes - 1) / (len(labels) - 1),
                between_class_shares={name: between_class_share(value, labels) for name, value in arrays.items()},
            )
            said.append(f'top-1 {summary["top1"]:.2f} %')
        write_reference(folder, seen, self.data)
        arrays.update(index=test.indices(len(labels)), label=labels, prediction=seen.predictions.numpy())
        np.savez_compressed(folder / 'lambda.npz', **arrays)
        if seen.residual:
            self.residual[label] = seen.lambdas
            summary.update(save_ranking(folder, label, seen, test))
        else:
            profiles = profile_merges(seen.lambdas)
            plot_paths(dict(mean=profiles), label, profiles).savefig(folder / 'profile.png', dpi=120)
        if self.ablation and seen.labelled:
            self.ablations[label] = ablate(model, test, seen.lambdas)
            summary['ablation'] = self.ablations[label]._asdict()
            said.append(f'{self.ablations[label].all:.2f} % with all merges at the identity')
        if train:
            summary['cumulative_match'] = self._match(label, observe(model, train[0]), seen, train[0], test)
        print(*said, sep=', ')

    def _match(
            self, label: str, fitted: Observed, seen: Observed, train: ImageData, test: ImageData) -> Dict[str, Any]:
        """Finds what PCA and LDA tell of the class, from λ and from pixels."""
        labels = fitted.labels.numpy(), seen.labels.numpy()
        features = as_features(fitted.lambdas), as_features(seen.lambdas)
        curve = cumulative_match(features[0], labels[0], features[1], labels[1])
        prepared = str(train.config)
        if prepared not in self.pixels:
            batches = [DataLoader(data.loader.dataset, PIXEL_BATCH, num_workers=data.loader.num_workers)
                       for data in (train, test)]
            reduced = reduce_pixels(*batches, components=min(COMPONENTS, len(labels[0])))
            self.pixels[prepared] = cumulative_match(reduced[0], labels[0], reduced[1], labels[1])
        pixels = self.pixels[prepared]
        self.matches[f'{features[0].shape[1]} λ of {label}'] = curve
        self.matches[f'{np.prod(train.config["input_size"]):,} pixels'] = pixels
        return dict(
            train_images=len(labels[0]), mixing_weights=curve.tolist(), pixels=pixels.tolist(),
            mean_difference=float((curve - pixels).mean()))

    def save(self, output: Path, settings: Mapping[str, Any]) -> None:
        """Writes what is about all models."""
        versions = dict(timm_awm=__version__, timm=timm.__version__, torch=torch.__version__)
        record = dict(models=self.summaries, settings=settings, **versions)
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (output / 'summary.json').write_text(text, encoding='utf-8', errors='replace')
        if self.residual:
            plot_profiles(self.residual).savefig(output / 'profile.png', dpi=120)
        if self.ablations:
            plot_ablations(self.ablations).savefig(output / 'ablation.png', dpi=120)
        if self.matches:
            plot_cumulative_matches(self.matches).savefig(output / 'cumulative-match.png', dpi=120)
