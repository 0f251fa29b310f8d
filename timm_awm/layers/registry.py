"""The merges that are alive in this process: optimizers, which get no model, ask which parameters are a merge's."""
import weakref
from typing import Iterable, List

from torch import Tensor, nn

__all__ = ['live', 'merge_parameters', 'renew_compiled_guards']

live: 'weakref.WeakSet[nn.Module]' = weakref.WeakSet()


def merge_parameters() -> List[nn.Parameter]:
    """The parameters of all merges that are alive in this process."""
    return [p for mix in list(live) for p in mix.parameters()]


def renew_compiled_guards(params: Iterable[Tensor]) -> None:
    """Makes compiled networks with merges of these parameters look again at which parameters require gradients.

    torch.compile trusts a module whose dict of parameters is the same. In torch 2.9 it does not see `requires_grad_`,
    and would go on with the graph of the other phase; in 2.14 it does.
    """
    own = {id(p) for p in params}
    for mix in list(live):
        if any(id(p) in own for p in mix.parameters()):
            mix._parameters = dict(mix._parameters)
