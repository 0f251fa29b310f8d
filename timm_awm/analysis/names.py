"""The models that people name, found and loaded in one place."""
import os
from pathlib import Path
from typing import Dict, Sequence, Union

import timm
from huggingface_hub import snapshot_download
from torch import nn

from ..hub import export_run, load_folder
from ..hub.folder import CONFIG, REFERENCE
from ..models.checkpoint import SAFETENSORS

Source = Union[Path, str]  # a Hub folder, or the name of one of timm's models
RUN = 'args.yaml'


def resolve_models(names: Sequence[str], temporary: Path) -> Dict[str, Source]:
    """Finds models by what people call them.

    Args:
        names: Names of models: timm's, `hf-hub:OWNER/NAME[@REVISION]`, `local-dir:FOLDER`, or a folder, which is a Hub
            folder or a run of train.py. A model of the Hub is fetched into its cache.
        temporary: Folder that runs are exported to, with the weights of their last epoch.

    Returns:
        Label for folders and legends, each different -> the model, in the same order.

    Raises:
        OSError: The Hub cannot be reached or refuses.
        ValueError: There is no such model; or as `timm_awm.hub.export_run`, for runs.
    """
    found: Dict[str, Source] = {}
    for name in names:
        base = name.split('/', 1)[-1].replace('/', '-') if name.startswith('hf-hub:') else folder_of(name).name
        label, n = base, 1
        while label in found:
            n += 1
            label = f'{base}-{n}'
        found[label] = _find(name, temporary / label)
    return found


def folder_of(name: str) -> Path:
    """The folder that a name means, if it means one."""
    return Path(os.path.abspath(name.removeprefix('local-dir:')))


def load_model(source: Source) -> nn.Module:
    """Loads a model that `resolve_models` found, with its weights."""
    return load_folder(source) if isinstance(source, Path) else timm.create_model(source, pretrained=True)


def _find(name: str, exported: Path) -> Source:
    if name.startswith('hf-hub:'):
        repository, _, revision = name.removeprefix('hf-hub:').partition('@')
        files = [CONFIG, SAFETENSORS, REFERENCE]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    folder = folder_of(name)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / RUN).is_file():
        export_run(folder, exported)
        return exported
    if timm.is_model_pretrained(name):
        return name
    inside = sorted({str(file.parent) for what in (CONFIG, RUN) for file in folder.glob(f'*/{what}')})
    raise ValueError(
        f'There is no model {name}, neither as a folder with {CONFIG} or {RUN} nor among those that timm has weights '
        'for. A model is a name of timm, hf-hub:OWNER/NAME[@REVISION], local-dir:FOLDER, a Hub folder or a run of '
        'train.py.' + (f' There are models in it, name one: {", ".join(inside)}' if inside else ''))
