"""The work of `timm-awm analyze`: every question for every model, on a data set, image by image."""
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
from torch.utils.data import DataLoader

from .. import __version__
from ..hub.folder import REFERENCE
from ..hub.training_run import data_name
from ..layers import MixingWeights
from ..utils import find_device, new_folder
from .ablation import Ablation, ablate, plot_ablations
from .discriminant import COMPONENTS, as_features, cumulative_match, plot_cumulative_matches, reduce_pixels
from .inputs import ImageData
from .names import folder_of, load_model, resolve_models
from .observed import Observed, observe
from .profile import Profile, between_class_share, plot_depth, plot_paths, profile_merges
from .ranking import save_ranking
from .reference import data_of, write_reference


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
    summaries: Dict[str, Dict[str, Any]] = {}
    residual: Dict[str, Dict[str, Profile]] = {}  # of the ResNets
    ablations: Dict[str, Ablation] = {}
    matches: Dict[str, np.ndarray] = {}
    with new_folder(output) as partial, tempfile.TemporaryDirectory() as temporary:
        sources = resolve_models(models, Path(temporary))
        prepared = []  # all models and data, before hours go into the first
        for label, source in sources.items():
            model = load_model(source).to(on)
            if not any(module.weight2.any() for module in model.modules() if isinstance(module, MixingWeights)):
                raise ValueError(
                    f'{label} has no AWM merges, or all are at the identity start, lambda = 1/n for every image: '
                    'nothing to analyze. Name a run or a Hub folder of a trained AWM model.')
            splits = [ImageData(model, split=part, **data) for part in (split, train_split) if part]
            prepared.append((label, model, splits))
        for label, model, splits in prepared:
            test, folder = splits[0], partial / label
            folder.mkdir()
            seen = observe(model, test)
            if train_split and not seen.labelled:
                raise ValueError('PCA and LDA need labels of two classes or more: leave --train-split out.')
            summary = summaries[label] = _summarise(seen)
            write_reference(folder, seen, f'{data_name(data)[0]}, {split}')
            arrays: Dict[str, Any] = dict(seen.lambdas, index=test.indices, label=seen.labels)
            np.savez_compressed(folder / 'lambda.npz', prediction=seen.predictions, **arrays)
            profiles = profile_merges(seen.lambdas)
            if all(len(mean) == 2 for mean, _ in profiles.values()):
                residual[label] = profiles
                summary.update(save_ranking(folder, label, seen, test))
            else:
                plot_paths(dict(mean=profiles), label, profiles).savefig(folder / 'profile.png', dpi=120)
            if ablation and seen.labelled:
                ablations[label] = ablate(model, test, seen.lambdas)
                summary['ablation'] = ablations[label]._asdict()
            if train_split:
                curve, pixels = _match(observe(model, splits[1]), seen, splits[1], test)
                matches[f'λ of {label}'], matches[f'{np.prod(test.config["input_size"]):,} pixels'] = curve, pixels
                summary['cumulative_match'] = dict(mixing_weights=curve.tolist(), pixels=pixels.tolist())
            print(f'{label}:', {key: value for key, value in summary.items() if isinstance(value, (int, float))})
        versions = dict(timm_awm=__version__, timm=timm.__version__, torch=torch.__version__)
        record = dict(models=summaries, settings=settings, **versions)
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (partial / 'summary.json').write_text(text, encoding='utf-8', errors='replace')
        if residual:
            plot_depth(residual).savefig(partial / 'profile.png', dpi=120)
        if ablations:
            plot_ablations(ablations).savefig(partial / 'ablation.png', dpi=120)
        if matches:
            plot_cumulative_matches(matches).savefig(partial / 'cumulative-match.png', dpi=120)
    for name, (label, source) in zip(models, sources.items()):
        if source == folder_of(name) and not data.get('num_images'):
            # for `timm-awm explore`, and for who gets the folder; a sample is not worth it
            new, own = output / label / REFERENCE, folder_of(name) / REFERENCE
            with suppress(OSError):
                if own.exists() and data_of(own) not in (None, data_of(new)):
                    print(f'{own} is of {data_of(own)}, and stays: delete it to have that of {data_of(new)} there.')
                    continue
                shutil.copyfile(new, own)
                print(f'{own}: what timm-awm explore compares a picture with.')
    print(f'Everything is in {output}.')
    return summaries


def _summarise(seen: Observed) -> Dict[str, Any]:
    summary: Dict[str, Any] = dict(images=len(seen.labels), merges=len(seen.lambdas))
    if seen.labelled:
        labels = seen.labels.numpy()
        classes = len(np.unique(labels))
        lambdas = {name: value.numpy() for name, value in seen.lambdas.items()}
        summary.update(
            classes=classes,
            top1=100 * float((seen.labels == seen.predictions).double().mean()),
            between_class_share=between_class_share(np.hstack(list(lambdas.values())), labels),
            between_class_share_by_chance=(classes - 1) / (len(labels) - 1),
            between_class_shares={name: between_class_share(value, labels) for name, value in lambdas.items()},
        )
    return summary


def _match(fitted: Observed, seen: Observed, train: ImageData, test: ImageData) -> Tuple[np.ndarray, np.ndarray]:
    """Cumulative matches of λ and of pixels."""
    train_labels, labels = fitted.labels.numpy(), seen.labels.numpy()
    curve = cumulative_match(as_features(fitted.lambdas), train_labels, as_features(seen.lambdas), labels)
    of_train, of_test = [  # batches that are large enough for the principal components to settle
        DataLoader(data.loader.dataset, 256, num_workers=data.loader.num_workers) for data in (train, test)]
    train_pixels, test_pixels = reduce_pixels(of_train, of_test, min(COMPONENTS, len(train_labels)))
    return curve, cumulative_match(train_pixels, train_labels, test_pixels, labels)
