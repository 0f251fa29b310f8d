"""The models that people name, found in one place."""
import os
import re
from pathlib import Path
from typing import Dict, Sequence, Union

import timm
from huggingface_hub import snapshot_download

from ..hub import export_run
from ..hub.folder import CONFIG, REFERENCE
from ..models.checkpoint import SAFETENSORS

__all__ = ['Source', 'folder_of', 'resolve_models']

Source = Union[Path, str]  # a Hub folder, or the name of one of timm's models
RUN = 'args.yaml'
FORMS = "A model is timm's name, hf-hub:OWNER/NAME[@REVISION], local-dir:FOLDER, a Hub folder or a run of train.py."


def resolve_models(names: Sequence[str], temporary: Path, checkpoints: Sequence[str] = ()) -> Dict[str, Source]:
    """Finds models by what people call them.

    Args:
        names: Of each model the name that timm has for it, `hf-hub:OWNER/NAME[@REVISION]`, `local-dir:FOLDER`, or a
            folder: a Hub folder or a run of train.py. A model of the Hub is fetched into its cache.
        temporary: Folder that runs are exported to.
        checkpoints: One for each model, or none; their folders tell models of one name apart.

    Returns:
        Label for folders and legends, each different -> the model, in the same order.

    Raises:
        RuntimeError: The Hub cannot be reached or refuses; or as `timm_awm.hub.export_run`, for runs.
        ValueError: There is no such model.
    """
    found: Dict[str, Source] = {}
    for i, name in enumerate(names):
        base = _label(name) + (f'-{folder_of(checkpoints[i]).parent.name}' if checkpoints else '')
        label, n = base, 1
        while label in found:
            n += 1
            label = f'{base}-{n}'
        found[label] = _fetch(name) if name.startswith('hf-hub:') else _find(name, temporary / label)
    return found


def folder_of(name: str) -> Path:
    """The folder that a name means, if it means one."""
    return Path(os.path.abspath(name.removeprefix('local-dir:')))


def _label(name: str) -> str:
    if not name.startswith('hf-hub:'):
        return folder_of(name).name
    repository, _, revision = name.partition('@')
    return re.split('[:/]', repository)[-1] + (f'@{revision.replace("/", "-")}' if revision else '')


def _find(name: str, exported: Path) -> Source:
    folder = folder_of(name)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / RUN).is_file():
        export_run(folder, exported)
        return exported
    if folder.is_dir():
        inside = sorted({str(file.parent) for what in (CONFIG, RUN) for file in folder.glob(f'*/{what}')})
        raise ValueError(f'{folder} is no model: it has neither {CONFIG} nor {RUN}. '
                         + (f'There are models in it, name one: {", ".join(inside)}' if inside else FORMS))
    if not re.fullmatch(r'[\w.-]+', name) or not timm.is_model(name):
        raise ValueError(f'There is no model {name}, neither as a folder nor among those of timm. {FORMS}')
    return name


def _fetch(name: str) -> Path:
    repository, _, revision = name.removeprefix('hf-hub:').partition('@')
    files = [CONFIG, SAFETENSORS, REFERENCE]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the Hub's client and its connection raise all kinds
        raise RuntimeError(f'{name} cannot be fetched: {type(error).__name__}: {error}') from error
