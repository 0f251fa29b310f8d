"""The phase of each epoch."""
from dataclasses import dataclass
from numbers import Integral
from typing import Optional

BACKBONE, MERGE, JOINT = 'backbone', 'merge', 'joint'


@dataclass(frozen=True)
class PhaseSchedule:
    """Epochs of the backbone, then epochs of the merges, repeated: the arguments of `Alternating`."""
    period: int = 3
    merge_period: Optional[int] = None

    def __post_init__(self) -> None:
        require_int('period', self.period, 0)
        if self.merge_period is not None:
            require_int('merge_period', self.merge_period, 1)
            if self.period == 0:
                raise ValueError('merge_period makes no sense with period=0, which trains both sides jointly.')

    def phase(self, epoch: int) -> str:
        """The phase of an epoch, counted from 0: BACKBONE, MERGE or JOINT."""
        if self.period == 0:
            return JOINT
        return BACKBONE if epoch % (self.period + (self.merge_period or self.period)) < self.period else MERGE


def require_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name} must be a whole number, at least {least}, got {value!r}')
