"""The work of `timm-awm analyze`."""
import csv
import json
import math
import pickle
import re
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from ..layers import MixingWeights
from ..utils import find_device, new_folder
from .observe import Ablation, Observed, ablate, observe
from .plots import (
    plot_ablations,
    plot_class_means,
    plot_contact_sheet,
    plot_cumulative_matches,
    plot_path_profile,
    plot_profiles,
)
from .statistics import (
    COMPONENTS,
    as_features,
    between_class_share,
    class_means,
    cumulative_match,
    profile,
    rank_images,
    reduce_pixels,
)

__all__ = ['Settings', 'run']

SHOWN = 20  # images of either end of the ranking
PIXEL_BATCH = 256  # images, at least: enough for the principal components to settle


@dataclass(frozen=True)
class Settings:
    """What is analysed; all but the last three as timm's validate.py has it."""
    models: Sequence[str]  # as timm names them
    checkpoints: Sequence[str] = ()  # one for each model; without, models bring their own weights
    num_classes: Optional[int] = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ''
    data_dir: Optional[str] = None
    split: str = 'validation'
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    batch_size: int = 256
    workers: int = 4
    device: Optional[str] = None  # an accelerator if there is one
    train_split: Optional[str] = None  # what PCA and LDA are fitted on; without, they are left out
    num_images: Optional[int] = None  # of each split, drawn at random; without, all
    ablation: bool = True


class _Draw(Subset):
    """A part of a data set, which takes the transform that timm's loader gives it."""

    @property
    def transform(self) -> Any:
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Data:
    """A split as a model takes it: batches, checked, with a progress bar, as often as they are asked for."""
    loader: DataLoader
    title: str
    num_classes: int
    class_names: Mapping[int, str]  # as far as the data set tells them

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, labels in tqdm(self.loader, desc=self.title, unit='batch', mininterval=0.5):
            if labels.ndim != 1 or labels.max() >= self.num_classes:
                raise ValueError(
                    f'The model tells {self.num_classes} classes apart, and the data have others: analyse it on its '
                    'own data, or say how many classes a checkpoint is of with --num-classes.')
            yield images, labels

    def name(self, label: int) -> str:
        return self.class_names.get(label, str(label))

    def indices(self, count: int) -> np.ndarray:
        """Where the images are in the data set."""
        return np.asarray(getattr(self.loader.dataset, 'indices', range(count)))


@dataclass
class _Results:
    """Of all models, by their labels."""
    profile: List[Dict[str, Any]] = field(default_factory=list)  # rows
    summaries: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    residual: Dict[str, Dict[str, Tensor]] = field(default_factory=dict)  # λ of the ResNets
    ablations: Dict[str, Ablation] = field(default_factory=dict)
    matches: Dict[str, np.ndarray] = field(default_factory=dict)
    pixels: Dict[str, np.ndarray] = field(default_factory=dict)  # by what is done to the images


def run(settings: Settings, output: Path) -> None:
    """Analyse models on a data set, image by image, and leave arrays, tables and figures in a folder.

    Args:
        settings: What to analyse.
        output: New folder, which appears when everything in it is complete.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: A checkpoint is not there.
        ValueError: A model has no merges or untrained ones, or the data cannot be read or do not fit.
        RuntimeError: A model cannot be made, among others of torch's own.
    """
    if settings.checkpoints and len(settings.checkpoints) != len(settings.models):
        raise ValueError(
            f'{len(settings.checkpoints)} checkpoints for {len(settings.models)} models: give one for each.')
    device = find_device(settings.device)
    with new_folder(output) as partial_output:
        checkpoints: Sequence[Optional[str]] = settings.checkpoints or [None] * len(settings.models)
        # all of them, before hours go into the first
        models = [_create(name, checkpoint, settings) for name, checkpoint in zip(settings.models, checkpoints)]
        results = _Results()
        for label, model in zip(_labels(settings.models, checkpoints), models):
            _analyze(label, model.to(device), settings, partial_output / label, results)
            model.cpu()
        _save(results, settings, partial_output)
    print(f'Everything is in {output}.')


def _create(name: str, checkpoint: Optional[str], settings: Settings) -> nn.Module:
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'There is no checkpoint {checkpoint!r}.')
    create = partial(timm.create_model, name, num_classes=settings.num_classes, **settings.model_kwargs)
    hint = ''
    try:
        with torch.device('meta'):  # before anything is downloaded
            merges = [m for m in create().modules() if isinstance(m, MixingWeights)]
        if not merges:
            raise ValueError(
                'there are no AWM merges in it, so there is no λ to analyse. Name an awm_* model, without awm=False.')
        if not checkpoint:
            hint = ' Trained weights of your own: --checkpoint FILE.'
        model = create(pretrained=not checkpoint)
        if checkpoint:
            load_checkpoint(model, checkpoint)
    except (AssertionError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f'{name}: {error}{hint}') from error
    if not any(m.weight2.any() for m in model.modules() if isinstance(m, MixingWeights)):
        raise ValueError(
            f'{name}: every merge is at the identity start, λ = 1/n for every image, so there is nothing to analyse. '
            'Take trained weights, for instance with --checkpoint FILE.')
    return model


def _labels(models: Sequence[str], checkpoints: Sequence[Optional[str]]) -> List[str]:
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


def _data(settings: Settings, model: nn.Module, split: str, title: str, batch_size: int = 0) -> _Data:
    config = resolve_data_config({}, model=model)
    try:
        dataset = create_dataset(
            settings.dataset,
            root=settings.data_dir,
            split=split,
            input_key=settings.input_key,
            target_key=settings.target_key,
            input_img_mode='RGB' if config['input_size'][0] == 3 else 'L',
        )
        streamed = isinstance(dataset, IterableDataset)
        if not streamed:
            dataset[0]
    except Exception as error:  # whatever a reader of data can raise
        raise ValueError(
            f'The split {split!r} cannot be read ({type(error).__name__}: {error}). What is read is said by --dataset, '
            '--data-dir, --split, --train-split, --input-key and --target-key, as for validate.py.') from error
    reader = getattr(dataset, 'reader', dataset)
    class_names = {index: str(name) for name, index in (getattr(reader, 'class_to_idx', None) or {}).items()}
    if settings.num_images:
        if streamed:
            raise ValueError('From a data set that is streamed, no images can be drawn: leave --num-images out.')
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:settings.num_images]
        dataset = _Draw(dataset, drawn.sort().values.tolist())
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=batch_size or settings.batch_size,
        use_prefetcher=False,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=settings.workers,
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        persistent_workers=False,
    )
    return _Data(loader, title, model.num_classes, class_names)


def _analyze(label: str, model: nn.Module, settings: Settings, folder: Path, results: _Results) -> None:
    folder.mkdir()
    data = _data(settings, model, settings.split, f'{label}, {settings.split}')
    seen = observe(model, data)
    labels = seen.labels.numpy()
    labelled = 0 <= labels.min() < labels.max()
    summary = results.summaries[label] = dict(images=len(labels), merges=len(seen.lambdas))
    all_lambdas = torch.cat(list(seen.lambdas.values()), dim=1).numpy()
    if labelled:
        classes = len(np.unique(labels))
        summary.update(
            classes=classes,
            top1=100 * float((seen.labels == seen.predictions).double().mean()),
            between_class_share=_or_none(between_class_share(all_lambdas, labels)),
            between_class_share_by_chance=(classes - 1) / (len(labels) - 1),
        )
        _save_class_means(folder, label, seen, data)
    results.profile += _profile_rows(label, seen, labelled)
    arrays: Dict[str, Any] = {name: value.numpy() for name, value in seen.lambdas.items()}
    arrays.update(index=data.indices(len(labels)), label=labels, prediction=seen.predictions.numpy())
    np.savez_compressed(folder / 'lambda.npz', **arrays)
    if all(value.shape[1] == 2 for value in seen.lambdas.values()):
        results.residual[label] = seen.lambdas
        summary.update(_save_ranking(folder, label, seen, model, data, labelled))
    else:
        plot_path_profile(seen.lambdas, label).savefig(folder / 'profile.png', dpi=120)
    if settings.ablation and labelled:
        ablation = results.ablations[label] = ablate(
            model, _data(settings, model, settings.split, f'{label}, merges held constant'), seen.lambdas)
        summary['ablation'] = ablation._asdict()
    if settings.train_split:
        if not labelled:
            raise ValueError('PCA and LDA need labels of two classes or more: leave --train-split out.')
        summary['cumulative_match'] = _match(label, model, settings, seen, results)
    print(_line(label, summary))


def _profile_rows(label: str, seen: Observed, labelled: bool) -> List[Dict[str, Any]]:
    rows = []
    for name, (mean, std) in profile(seen.lambdas).items():
        for path in range(len(mean)):
            share = None
            if labelled:
                share = _or_none(between_class_share(
                    seen.lambdas[name][:, path:path + 1].numpy(), seen.labels.numpy()))
            rows.append(dict(
                model=label, merge=name, paths=len(mean), path=path + 1, mean=float(mean[path]), std=float(std[path]),
                between_class_share=share))
    return rows


def _save_class_means(folder: Path, label: str, seen: Observed, data: _Data) -> None:
    """classes.csv and its picture: a row for each class, a column for each λ."""
    values = torch.cat(list(seen.lambdas.values()), dim=1).numpy()
    classes, counts, means = class_means(values, seen.labels.numpy())
    columns = [f'{name}:{path + 1}' for name, value in seen.lambdas.items() for path in range(value.shape[1])]
    with (folder / 'classes.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['class', 'images', *columns])
        for index, count, row in zip(classes.tolist(), counts.tolist(), means.tolist()):
            writer.writerow([data.name(index), count, *row])
    plot_class_means(means, [data.name(index) for index in classes.tolist()], seen.lambdas, label).savefig(
        folder / 'classes.png', dpi=120)


def _save_ranking(
        folder: Path,
        label: str,
        seen: Observed,
        model: nn.Module,
        data: _Data,
        labelled: bool,
) -> Dict[str, List[Dict[str, Any]]]:
    """The contact sheet; returns what is on it."""
    order, sums = rank_images(seen.lambdas)
    shown = min(SHOWN, len(order) // 2) or 1
    ends = dict(lowest=order[:shown].tolist(), highest=order[::-1][:shown].tolist())
    images = _pick(data, {i for end in ends.values() for i in end})
    config = resolve_data_config({}, model=model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    indices = data.indices(len(order))
    groups, listed = {}, {}
    for title, end in ends.items():
        groups[f'{label}: {title} sums of λ1'] = [
            ((images[i] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(),
             '\n'.join([data.name(int(seen.labels[i])) if labelled else str(indices[i]), f'{sums[i]:.3f}']))
            for i in end]
        listed[title] = [
            dict(index=int(indices[i]), label=data.name(int(seen.labels[i])) if labelled else None, sum=float(sums[i]))
            for i in end]
    plot_contact_sheet(groups).savefig(folder / 'ranking.png', dpi=120)
    return listed


def _pick(data: _Data, positions: Set[int]) -> Dict[int, Tensor]:
    """Images by their place in the order of the loader, from which they come again, for not all of them are kept."""
    images: Dict[int, Tensor] = {}
    start = 0
    for batch, _ in data.loader:
        images.update({i: batch[i - start] for i in positions.intersection(range(start, start + len(batch)))})
        start += len(batch)
        if len(images) == len(positions):
            break
    return images


def _match(label: str, model: nn.Module, settings: Settings, seen: Observed, results: _Results) -> Dict[str, Any]:
    """Cumulative match from λ, and from pixels, which is shared by models that take the same."""
    assert settings.train_split
    train = observe(model, _data(settings, model, settings.train_split, f'{label}, {settings.train_split}'))

    def match(of_train: np.ndarray, of_test: np.ndarray) -> np.ndarray:
        return cumulative_match(of_train, train.labels.numpy(), of_test, seen.labels.numpy())

    features = as_features(train.lambdas)
    curve = match(features, as_features(seen.lambdas))
    config = resolve_data_config({}, model=model)
    if str(config) not in results.pixels:
        batch_size = max(settings.batch_size, PIXEL_BATCH)
        results.pixels[str(config)] = match(*reduce_pixels(
            _data(settings, model, settings.train_split, f'pixels, {settings.train_split}', batch_size),
            _data(settings, model, settings.split, f'pixels, {settings.split}', batch_size),
            min(COMPONENTS, len(train.labels))))
    pixels = results.pixels[str(config)]
    results.matches[f'{features.shape[1]} λ of {label}'] = curve
    results.matches[f'{math.prod(config["input_size"]):,} pixels'] = pixels
    return dict(
        train_images=len(train.labels),
        mixing_weights=curve.tolist(),
        pixels=pixels.tolist(),
        mean_difference=float((curve - pixels).mean()),
    )


def _save(results: _Results, settings: Settings, output: Path) -> None:
    """What is about all models."""
    with (output / 'profile.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(results.profile[0]))
        writer.writeheader()
        writer.writerows(results.profile)
    record = dict(
        models=results.summaries, settings=asdict(settings), timm_awm=version('timm-awm'), timm=timm.__version__,
        torch=torch.__version__)
    (output / 'summary.json').write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding='utf-8')
    if results.residual:
        plot_profiles(results.residual).savefig(output / 'profile.png', dpi=120)
    if results.ablations:
        plot_ablations(results.ablations).savefig(output / 'ablation.png', dpi=120)
    if results.matches:
        plot_cumulative_matches(results.matches).savefig(output / 'cumulative-match.png', dpi=120)


def _line(label: str, summary: Mapping[str, Any]) -> str:
    parts = [f'{summary["images"]:,} images']
    if 'top1' in summary:
        parts.append(f'top-1 {summary["top1"]:.2f} %')
    if 'ablation' in summary:
        parts.append(f'{summary["ablation"]["constant"]:.2f} % with every λ at its mean')
        parts.append(f'{summary["ablation"]["all"]:.2f} % with all merges at the identity')
    if summary.get('between_class_share') is not None:
        parts.append(f'{summary["between_class_share"]:.1%} of the variance of λ between classes (by chance '
                     f'{summary["between_class_share_by_chance"]:.1%})')
    if 'cumulative_match' in summary:
        match = summary['cumulative_match']
        parts.append(f'rank 1 by λ {match["mixing_weights"][0]:.2f} %, by pixels {match["pixels"][0]:.2f} %')
    return f'{label}: {", ".join(parts)}'


def _or_none(share: float) -> Optional[float]:
    """JSON has no NaN."""
    return None if math.isnan(share) else share
