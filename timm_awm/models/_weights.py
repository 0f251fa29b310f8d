"""Where the weights of AWM models come from, and what makes sure that they arrive whole."""
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch import nn

__all__ = ['add_merges', 'checkpoint_problem', 'fetch', 'identity_cfg', 'identity_cfgs', 'only_safetensors']

SAFETENSORS = 'model.safetensors'


def identity_cfgs(name: str) -> Dict[str, PretrainedCfg]:
    """The installed timm's own checkpoints of a plain network, as starts for its AWM model, with the merges at the
    identity: `resnet50.a1_in1k` of timm/resnet50.a1_in1k becomes `awm_resnet50.a1_in1k_identity`.

    Args:
        name: Of the AWM model.
    """
    plain = get_arch_pretrained_cfgs(name.removeprefix('awm_'))
    return {f'awm_{key}_identity': identity_cfg(cfg, name) for key, cfg in plain.items() if cfg.hf_hub_id}


def identity_cfg(cfg: PretrainedCfg, architecture: str) -> PretrainedCfg:
    """A checkpoint of a plain network as a start for an AWM model, of the name that is given."""
    if not cfg.hf_hub_id:
        return replace(cfg, url=None, architecture=architecture)  # timm's few urls without a repository are of pickles
    return replace(
        cfg,
        url=None,
        hf_hub_filename=SAFETENSORS,
        architecture=architecture,
        tag=f'{cfg.tag}_identity',
        description=(
            f'The plain network {cfg.hf_hub_id} with merges at the identity start: the same function. Needs the '
            'package timm-awm: import timm_awm.'),
    )


def only_safetensors(pretrained_cfg: Any, overlay: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """Keeps timm from taking pickled weights, by itself, from where it finds no others.

    Args:
        pretrained_cfg: As for `timm.create_model`.
        overlay: The `pretrained_cfg_overlay`; may name another file, which is then read with `weights_only=True`.

    Returns:
        The overlay to load with.

    Raises:
        FileNotFoundError: A folder holds no safetensors.
    """
    overlay = dict(overlay or {})
    cfg = {**(pretrained_cfg if isinstance(pretrained_cfg, dict) else {}), **overlay}
    if cfg.get('source') == 'hf-hub':
        overlay.setdefault('hf_hub_filename', SAFETENSORS)
    elif cfg.get('source') == 'local-dir':
        weights = Path(cfg['file'])
        if weights.is_dir():
            weights = weights / SAFETENSORS
            if not weights.is_file():
                raise FileNotFoundError(
                    f'There is no {SAFETENSORS} in {str(weights.parent)!r}. Weights in pickle form are read only if '
                    'they are asked for: pretrained_cfg_overlay=dict(file=...), with the path of the file.')
        overlay.update(file=str(weights), source=None)
    return overlay


def fetch(cfg: Mapping[str, Any], cache_dir: Union[str, Path, None] = None) -> Optional[str]:
    """Gets weights from the Hub, and compares them with their SHA-256, after which the Hub's cache names them. The
    Hub's client compares sizes only.

    Args:
        cfg: A `pretrained_cfg`.
        cache_dir: The Hub's cache, if it is not the default one.

    Returns:
        The file in the cache; None if the weights are not on the Hub.

    Raises:
        RuntimeError: There are no safetensors, or they came damaged, and have been removed.
    """
    elsewhere = cfg.get('source') != 'hf-hub' and (cfg.get('file') or cfg.get('state_dict'))
    if elsewhere or not cfg.get('hf_hub_id'):
        return None
    repo_id, _, revision = cfg['hf_hub_id'].partition('@')  # as timm names a revision
    filename = cfg.get('hf_hub_filename') or SAFETENSORS
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))
    except LocalEntryNotFoundError:  # no network: the next one's kind, but not what it says
        raise
    except EntryNotFoundError as error:
        raise RuntimeError(
            f'{repo_id} has no {filename}. Weights in pickle form are read only if they are asked for: '
            "pretrained_cfg_overlay=dict(hf_hub_filename='pytorch_model.bin').") from error
    blob = path.resolve()
    if re.fullmatch('[0-9a-f]{64}', blob.name):  # else there are no links on this file system, or it is a small file
        with blob.open('rb') as file:
            digest = sha_fileobj(file).hex()
        if digest != blob.name:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise RuntimeError(
                f'{filename} of {repo_id} was damaged on its way from the Hub or in the cache. It has been removed '
                'from there: try again.')
    return str(path)


def add_merges(
        state_dict: Dict[str, Any],
        model: nn.Module,
        plain_filter: Optional[Callable] = None,
        published: bool = False,
        strict: bool = True,
) -> Dict[str, Any]:
    """Lets a plain checkpoint start an AWM model at the identity, and refuses one that is not whole, which timm would
    load without a word where the classes differ.

    Args:
        state_dict: As it was read.
        model: The new model, with its `pretrained_cfg`.
        plain_filter: timm's own for checkpoints of the plain network.
        published: The checkpoint came with a config.json, which may not weaken these checks.
        strict: Whether a part of the backbone may not be missing.

    Raises:
        RuntimeError: Merges, parts of the backbone or classes are missing.
    """
    if plain_filter is not None:
        state_dict = plain_filter(state_dict)
    own = model.state_dict()
    merges = {k: v for k, v in own.items() if _is_merge_key(k)}
    missing = {k for k in own.keys() - state_dict.keys() if not k.endswith('num_batches_tracked')}
    missing_merges = merges.keys() & missing
    if missing_merges and (published or len(missing_merges) < len(merges)):
        raise RuntimeError(_incomplete(missing_merges, merges))
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    classifier = cfg.get('classifier') or ''
    missing -= merges.keys()
    if not published or cfg['num_classes'] < 1:  # that of a published model of no classes is to be new
        missing -= {f'{classifier}.weight', f'{classifier}.bias'}
    if missing and (strict or published):
        raise RuntimeError(
            f'The checkpoint lacks {len(missing)} of the tensors of the network ({_some(missing)}): it is damaged, or '
            'belongs to another architecture or to other model arguments.')
    weight = state_dict.get(f'{classifier}.weight')
    if published and weight is not None and len(weight) != cfg['num_classes']:
        raise RuntimeError(
            f'config.json says that the checkpoint is of {cfg["num_classes"]} classes, but its classifier has '
            f'{len(weight)}: correct config.json, or use pretrained_cfg_overlay=dict(num_classes={len(weight)}).')
    # those of the new model: W2 is zero
    return {**state_dict, **{k: merges[k] for k in missing_merges}}


def _is_merge_key(key: str) -> bool:
    return '.merge.' in key


def checkpoint_problem(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Why a checkpoint does not fit the model and what to do about it; empty if its keys and shapes do fit."""
    if 'state_dict' in state_dict or any(k.startswith(('module.', '_orig_mod.')) for k in state_dict):
        return 'This is a checkpoint of a training run: load it with timm.models.load_checkpoint(model, path).'
    own = model.state_dict()
    # torch itself makes up for counters that old checkpoints lack
    missing = {k for k in own.keys() - state_dict.keys() if not k.endswith('num_batches_tracked')}
    unknown = state_dict.keys() - own.keys()
    misshapen = {
        k for k in own.keys() & state_dict.keys() if getattr(state_dict[k], 'shape', None) != own[k].shape}
    if not (missing or unknown or misshapen):
        return ''
    merges = {k for k in own if _is_merge_key(k)}
    if missing == merges and not (unknown or misshapen):
        return (
            'This is a checkpoint of the plain network, it has no merge weights. To start AWM from it, with every '
            'merge at the identity, use create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)) or '
            '`train.py --pretrained --pretrained-path ...`, which also starts a new classifier; for the plain network '
            'add awm=False.')
    if missing < merges and not (unknown or misshapen):
        return _incomplete(missing, merges)
    return (
        f'The checkpoint does not fit this {type(model).__name__}, of {len(own)} tensors '
        f'{len(missing)} are missing ({_some(missing)}), {len(misshapen)} have another shape ({_some(misshapen)}), '
        f'and {len(unknown)} are unknown ({_some(unknown)}). It belongs to another architecture or to other model '
        'arguments: create the model that it was saved from.')


def _incomplete(missing: Iterable[str], merges: Iterable[str]) -> str:
    missing, merges = list(missing), list(merges)
    return (
        f'The checkpoint lacks {len(missing)} of the {len(merges)} merge weights ({_some(missing)}): it is damaged or '
        'was saved from another AWM model. Use the complete checkpoint.')


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ', '.join(keys[:2] + ['...'] * (len(keys) > 2)) or 'none'
