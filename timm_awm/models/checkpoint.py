"""Plain checkpoints as starts of AWM models, and errors for those that do not fit."""
from dataclasses import replace
from typing import Any, Dict, Iterable, Mapping

from timm.models import PretrainedCfg
from timm.models.densenet import _filter_torchvision_pretrained  # private: there is no other
from torch import Tensor, nn

SAFETENSORS = 'model.safetensors'


def identity_cfg(cfg: PretrainedCfg, architecture: str) -> PretrainedCfg:
    """A checkpoint of a plain network as a start for an AWM model of this name."""
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
            'package timm_awm: import timm_awm.'),
    )


def checkpoint_filter(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """timm's `pretrained_filter_fn` of all AWM models. Lets a plain checkpoint start one at the identity; raises a
    RuntimeError for one that is not whole, which timm loads without a word where the classes differ."""
    state_dict = _filter_torchvision_pretrained(state_dict)
    own = model.state_dict()
    merges = {k: v for k, v in own.items() if _is_merge_key(k)}
    if merges.keys().isdisjoint(state_dict):
        state_dict = {**state_dict, **merges}  # W2 is zero
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    missing = {k for k in _missing(own, state_dict) if not k.startswith(f'{cfg["classifier"]}.')}
    if missing:
        raise RuntimeError(
            f'The checkpoint lacks {len(missing)} of the {len(own)} tensors of the network ({_some(missing)}): it is '
            'damaged, or belongs to another architecture or to other model arguments.')
    return state_dict


def checkpoint_problem(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Why a checkpoint does not fit the model and what to do about it; empty if its keys and shapes do fit."""
    if 'state_dict' in state_dict or any(k.startswith(('module.', '_orig_mod.')) for k in state_dict):
        return 'This is a checkpoint of a training run: load it with timm.models.load_checkpoint(model, path).'
    own = model.state_dict()
    missing, unknown = _missing(own, state_dict), state_dict.keys() - own.keys()
    misshapen = {k for k in own.keys() & state_dict.keys() if state_dict[k].shape != own[k].shape}
    if not (missing or unknown or misshapen):
        return ''
    if missing == {k for k in own if _is_merge_key(k)} and not (unknown or misshapen):
        return (
            'This is a checkpoint of the plain network, it has no merge weights. To start AWM from it, with every '
            'merge at the identity and its own classifier, use create_model(..., pretrained=True, '
            f'pretrained_cfg_overlay=dict(file=..., num_classes={model.num_classes})); '
            '`train.py --pretrained --pretrained-path ...` starts a new classifier; for the plain network add '
            'awm=False.')
    return (
        f'The checkpoint does not fit this {type(model).__name__}: of {len(own)} tensors '
        f'{len(missing)} are missing ({_some(missing)}), {len(misshapen)} have another shape ({_some(misshapen)}), '
        f'and {len(unknown)} are unknown ({_some(unknown)}). It is damaged, or belongs to another architecture or to '
        'other model arguments: create the model that it was saved from.')


def _is_merge_key(key: str) -> bool:
    return '.merge.' in key


def _missing(own: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> set:
    # torch itself makes up for counters that old checkpoints lack
    return {k for k in own.keys() - state_dict.keys() if not k.endswith('num_batches_tracked')}


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ', '.join(keys[:2] + ['...'] * (len(keys) > 2)) or 'none'
