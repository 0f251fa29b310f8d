"""Any of timm's own ResNets or DenseNets with AWM merges: the same network, the same function."""
from typing import Any, Dict, Optional

from timm.models import (
    filter_pretrained_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from torch import nn

from .builder import add_merges, create_awm_model
from .checkpoint import identity_cfg

GENERIC = 'awm_converted'


def convert(model: nn.Module, awm_hidden: Optional[int] = None) -> nn.Module:
    """Gives one of timm's own ResNets or DenseNets AWM merges: changes the model itself, and returns it.

    On any device, in any dtype and mode, it computes what it did before (bit for bit, if merges are not fused:
    `set_fused_merge`), for every merge is at the identity start. Its parameters stay the same objects with the same
    names; hooks stay too. Merges stand behind attention and drop path. A copy: convert(deepcopy(model)).

    Args:
        model: A `timm.models.ResNet` of timm's blocks, with whatever arguments, a `timm.models.DenseNet`, or a plain
            control of timm_awm's 32x32 networks.
        awm_hidden: Width e of the merges' hidden layers, 16 for ResNets and 24 for DenseNets if not given.

    Raises:
        TypeError: It is no such model, or has merges; it is unchanged then.
    """
    add_merges(model, awm_hidden)
    args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k != 'awm'}  # timm's record of them
    if awm_hidden is not None:
        args['awm_hidden'] = awm_hidden
    cfg: Dict[str, Any] = getattr(model, 'pretrained_cfg', {})
    if cfg:
        base = args.get('base', cfg['architecture'].removeprefix('awm_'))
        architecture = f'awm_{base}'
        if not is_model(architecture):
            architecture = GENERIC
            args['base'] = base
        # where the weights came from is not known any more: nobody says whether they were loaded, or trained since
        model.pretrained_cfg = model.default_cfg = {
            **{k: v for k, v in filter_pretrained_cfg(cfg, remove_source=True).items() if k != 'tag'},
            'architecture': architecture,
            'description': f'{base} with AWM merges. Needs the package timm_awm: import timm_awm.',
        }
    model._model_args = args
    return model


default_cfgs = generate_default_cfgs({
    f'{GENERIC}.untrained': dict(pool_size=(7, 7), first_conv='conv1', classifier='fc'),
})


@register_model
def awm_converted(pretrained: bool = False, base: str = 'resnet50', **kwargs: Any) -> nn.Module:
    """Any ResNet or DenseNet of timm that `convert` takes, with AWM merges: `base` is its name.

    With pretrained=True and a base of timm, such as seresnet50.ra2_in1k, it is the plain network with its weights, the
    merges at the identity start. The models that `convert` made are saved under this name, with their base.
    """
    name, _ = split_model_name_tag(base)
    if name.startswith('awm_') or not is_model(name):
        raise ValueError(f'The base of {GENERIC} is the name of a plain ResNet or DenseNet of timm, not {base!r}.')
    if not kwargs.get('pretrained_cfg'):
        kwargs['pretrained_cfg'] = identity_cfg(get_pretrained_cfg(base), GENERIC).to_dict()
    feature_cfg = dict(flatten_sequential=True) if is_model_in_modules(name, ('densenet',)) else {}
    return create_awm_model(GENERIC, model_entrypoint(name), pretrained, feature_cfg=feature_cfg, **kwargs)
