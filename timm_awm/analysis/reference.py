"""The reference that one image is compared with: mean and spread of λ over a data set, and over each of its classes."""
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import numpy as np
import torch

from ..hub.folder import REFERENCE
from .observed import Observed
from .profile import Profile, profile_merges

ALL = 'all'  # the group of all images; the others are classes, by number


def write_reference(folder: Path, seen: Observed, data_name: str) -> None:
    """Writes lambda.json: {data, groups: {'all' or a class: {images, merges: {name: {mean, std}}}}}."""
    masks = {ALL: torch.ones(len(seen.labels), dtype=torch.bool)}
    if seen.labelled:
        masks.update((str(label), seen.labels == label) for label in seen.labels.unique().tolist())
    groups = {}
    for key, mask in masks.items():
        profiles = profile_merges({name: value[mask] for name, value in seen.lambdas.items()})
        groups[key] = dict(images=int(mask.sum()), merges={
            name: dict(mean=mean.round(4).tolist(), std=std.round(4).tolist())
            for name, (mean, std) in profiles.items()})
    text = json.dumps(dict(data=data_name, groups=groups), ensure_ascii=False)
    (folder / REFERENCE).write_text(text, encoding='utf-8', errors='replace')  # names of files need not be valid


def data_of(path: Path) -> Optional[str]:
    """Data set and split of a lambda.json; None if it is damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))['data']
    except (KeyError, TypeError, ValueError):
        return None


def read_reference(folder: Path, paths: Mapping[str, int]) -> Optional[Dict[str, Any]]:
    """Reads lambda.json in a model's folder, with a `Profile` for each merge; None if there is nothing.

    Args:
        paths: Name of each of the model's merges -> number of paths.

    Raises:
        ValueError: The file is damaged, or of another model.
    """
    path = folder / REFERENCE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        found['data'], found['groups'][ALL]['images']
        for group in found['groups'].values():
            group['merges'] = {
                name: Profile(*(np.array(values[what]) for what in Profile._fields))
                for name, values in group['merges'].items()}
            if any({name: len(values[i]) for name, values in group['merges'].items()} != paths for i in (0, 1)):
                raise ValueError('it is of another model')
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not what timm-awm analyze writes: {error!r}') from error
    return found
