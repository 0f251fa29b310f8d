"""Reading λ out of a model."""
from contextlib import ExitStack, contextmanager
from typing import Callable, Dict, Iterator, Mapping, Optional

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from .mixing import MixingWeights


@contextmanager
def record_mixing_weights(model: nn.Module) -> Iterator[Dict[str, Tensor]]:
    """Collect the mixing weights λ of every merge during the forward passes made inside the `with` block.

    Works on the model itself, a DDP wrapper, an EMA copy or a compiled model (which runs eagerly inside the block).

    Example::

        with record_mixing_weights(model) as lambdas:
            model(images)
        lambdas['layer1.0.merge']  # (batch, 2): the weight of F(x) and that of x, they sum to 1

    Yields:
        A dict, filled by each forward pass anew: name of the merge -> (batch, paths), in order of execution. The λ can
        be differentiated, and a merge that runs twice in a pass leaves its last; use `torch.no_grad` to only look.

    Raises:
        ValueError: The model has no merge; TorchScript and exported programs have lost theirs.
    """
    lambdas: Dict[str, Tensor] = {}

    def keep(name: str, mix: MixingWeights, scales: Tensor) -> None:
        lambdas[name] = scales / mix.num_paths

    with hook_merges(find_merges(model), keep):
        yield lambdas


def find_merges(model: nn.Module) -> Dict[str, MixingWeights]:
    """Finds what infers λ in each merge of a model, itself or wrapped, by the name of the merge."""
    mixes = {
        name.removesuffix('.mix'): module
        for name, module in unwrap_model(model).named_modules()
        if isinstance(module, MixingWeights)
    }
    if not mixes:
        raise ValueError(
            f'{type(model).__name__} has no AWM merge to read mixing weights from: '
            'create an awm_* model, not scripted, not exported, and without awm=False.')
    return mixes


@contextmanager
def hook_merges(
        mixes: Mapping[str, MixingWeights],
        hook: Callable[[str, MixingWeights, Tensor], Optional[Tensor]],
) -> Iterator[None]:
    """Inside the `with` block calls hook(name, module, n · λ) in every forward pass; what it returns is taken instead.

    Args:
        mixes: As from `find_merges`.
        hook: Gets and returns (batch, paths); None changes nothing.
    """
    with ExitStack() as stack:
        for name, mix in mixes.items():
            stack.enter_context(mix.register_forward_hook(lambda mix, _, scales, name=name: hook(name, mix, scales)))
        stack.enter_context(torch.compiler.set_stance('force_eager'))  # compiled code would not call the hooks
        yield
