"""Any of timm's own ResNets or DenseNets with AWM merges: the same network, the same function."""
from functools import partial
from typing import Any, Dict, Iterable, Optional

import timm
from timm.models import (
    BasicBlock,
    Bottleneck,
    DenseNet,
    ResNet,
    filter_pretrained_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    register_model,
    split_model_name_tag,
)
from timm.models.densenet import DenseBlock, DenseLayer, _filter_torchvision_pretrained  # private: there is no other
from torch import nn

from .models import (
    AwmCifarDenseNet,
    AwmCifarResNet,
    AwmDenseNet,
    AwmResNet,
    CifarDenseNet,
    CifarResNet,
    insert_concat_merges,
    insert_sum_merges,
)
from .models._awm import AwmModel, create_awm_model, enlist
from .models._weights import identity_cfg

__all__ = ['convert']

GENERIC = 'awm_converted'
BLOCKS = (BasicBlock, Bottleneck, DenseBlock, DenseLayer)
AWM_CLASSES: Dict[type, type] = {
    ResNet: AwmResNet,
    CifarResNet: AwmCifarResNet,
    DenseNet: AwmDenseNet,
    CifarDenseNet: AwmCifarDenseNet,
}


def convert(model: nn.Module, awm_hidden: Optional[int] = None) -> nn.Module:
    """Changes the model itself: gives one of timm's own ResNets or DenseNets AWM merges, and returns it.

    Trained or not, on any device, in any dtype and mode, it computes what it did before (bit for bit, if merges are not
    fused: `set_fused_merge`), for every merge is at the identity start. Only images smaller than its stride are refused
    from then on. Its parameters stay the same objects with the
    same names; hooks stay too. Merges stand where the sums and concatenations were, behind attention and drop path. It
    is then ready for the alternating optimizer and for `timm_awm.hub.save_for_hub`. A copy: convert(deepcopy(model)).

    Args:
        model: A `timm.models.ResNet` of BasicBlocks or Bottlenecks, with whatever arguments, a `timm.models.DenseNet`,
            or a plain control of timm_awm's 32x32 networks.
        awm_hidden: Width e of the merges' hidden layers, 16 for ResNets and 24 for DenseNets if not given.

    Raises:
        TypeError: It is no such model; it is unchanged then.
    """
    problem = _problem(model)
    if problem:
        raise TypeError(f'{problem} timm_awm.convert takes ResNets and DenseNets of timm: the network itself, before '
                        'it is wrapped, compiled or scripted.')
    insert: Any = insert_sum_merges if isinstance(model, ResNet) else insert_concat_merges
    insert(model, **({} if awm_hidden is None else dict(hidden_features=awm_hidden)))
    model.__class__ = AWM_CLASSES[type(model)]
    model.total_stride = max(info['reduction'] for info in model.feature_info if _is_left(model, info['module']))
    enlist(model)
    cfg: Dict[str, Any] = getattr(model, 'pretrained_cfg', {})
    if cfg:
        base = getattr(model, 'awm_base', cfg['architecture'].removeprefix('awm_'))
        architecture = f'awm_{base}'
        if not is_model(architecture):
            architecture = GENERIC
            model.awm_base = base  # what `awm_converted` builds it of
        # where the weights came from is not known any more: nobody says whether they were loaded, or trained since
        model.pretrained_cfg = model.default_cfg = {
            **{k: v for k, v in filter_pretrained_cfg(cfg, remove_source=True).items() if k != 'tag'},
            'architecture': architecture,
            'description': f'{base} with AWM merges. Needs the package timm-awm: import timm_awm.',
        }
    return model


def _problem(model: nn.Module) -> str:
    """Why a model cannot be converted; empty if it can."""
    if isinstance(model, AwmModel):
        return f'This {type(model).__name__} has merges already.'
    if type(model) not in AWM_CLASSES:
        return f'{type(model).__module__}.{type(model).__name__} is none of the classes that get merges.'
    if isinstance(model, ResNet):
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        blocks = [block for stage in stages if _is_left(stage) for block in stage]
    else:
        dense = [block for block in model.features if isinstance(block, DenseBlock)]
        blocks = [*dense, *(layer for block in dense for layer in block.values())]
    unknown = {type(block) for block in blocks} - set(BLOCKS)
    if unknown:
        return (
            f'This {type(model).__name__} is made of {_names(unknown)}, which join their paths by themselves; there is '
            f"a merge for timm's {_names(BLOCKS)} only.")
    return '' if blocks else f'This {type(model).__name__} has no blocks.'


def _names(classes: Iterable[type]) -> str:
    return ', '.join(sorted(cls.__name__ for cls in classes))


def _is_left(module: nn.Module, name: str = '') -> bool:
    """Whether a module in another has not been pruned, as by timm's `prune_intermediate_layers`."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return False
    return not (type(found) is nn.Identity or isinstance(found, nn.Sequential) and len(found) == 0)


default_cfgs = generate_default_cfgs({
    f'{GENERIC}.untrained': dict(pool_size=(7, 7), first_conv='conv1', classifier='fc'),
})


@register_model
def awm_converted(pretrained: bool = False, base: str = 'resnet50', **kwargs) -> nn.Module:
    """Any ResNet or DenseNet of timm that `convert` takes, with AWM merges: `base` is its name.

    With pretrained=True and a base of timm, such as seresnet50.ra2_in1k, it is the plain network with its weights, the
    merges at the identity start. The models that `convert` made are saved under this name, with their base.
    """
    name, _ = split_model_name_tag(base)
    if name.startswith('awm_') or not is_model(name):
        raise ValueError(f'The base of {GENERIC} is the name of a plain ResNet or DenseNet of timm, not {base!r}.')
    awm_hidden = kwargs.pop('awm_hidden', None)
    if not kwargs.get('pretrained_cfg'):
        kwargs['pretrained_cfg'] = identity_cfg(get_pretrained_cfg(base), GENERIC).to_dict()
    plain = partial(timm.create_model, name)
    model = create_awm_model(
        lambda **plain_kwargs: convert(plain(**plain_kwargs), awm_hidden),
        plain,
        GENERIC,
        pretrained,
        pretrained_filter_fn=_filter_torchvision_pretrained,
        feature_cfg=dict(flatten_sequential=True) if is_model_in_modules(name, ('densenet',)) else {},
        **kwargs,
    )
    model.awm_base = name
    return model
