"""Freezing that leaves requires_grad to the user."""
from typing import Any, Dict, Iterable

from torch import Tensor, nn


class IdleParameter(nn.Parameter):
    """A parameter that waits for its phase. Setting `requires_grad`, to True or to False, makes it an ordinary one, and
    `thaw` leaves it alone. Copies, also unpickled ones, are ordinary parameters that require gradients."""

    requires_grad = property(lambda self: False, lambda self, value: self.requires_grad_(value))

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        return self.requires_grad_(requires_grad)

    def __deepcopy__(self, memo: Dict[int, Any]) -> Tensor:
        return super().__deepcopy__(memo).requires_grad_()

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, (data, _, *rest) = super().__reduce_ex__(protocol)
        return rebuild, (data, True, *rest)


def freeze(params: Iterable[Tensor]) -> None:
    for p in params:
        p.requires_grad_(False)
        p.grad = None
        if type(p) is nn.Parameter:  # others, as DTensor, need their class
            p.__class__ = IdleParameter


def thaw(params: Iterable[Tensor]) -> None:
    """Undo `freeze`, except for those whose `requires_grad` somebody has set since."""
    for p in params:
        if type(p) is not nn.Parameter:
            p.requires_grad_(True)
