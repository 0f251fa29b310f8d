"""The phase of each epoch."""
from dataclasses import dataclass
from numbers import Integral
from typing import Optional

__all__ = ['BACKBONE', 'MERGE', 'JOINT', 'PhaseSchedule', 'require_int']

BACKBONE = 'backbone'
MERGE = 'merge'
JOINT = 'joint'


@dataclass(frozen=True)
class PhaseSchedule:
    """The alternation of the paper's section 3.2: t epochs of the backbone, then t epochs of the merges, repeated.

    Args:
        period: Epochs of a backbone phase (the paper's t); 0 for no alternation.
        merge_period: Epochs of a merge phase, as long as a backbone phase if not given.
        constant: The phase of every epoch without alternation.

    Raises:
        ValueError: A period is out of range.
    """
    period: int = 3
    merge_period: Optional[int] = None
    constant: str = JOINT

    def __post_init__(self) -> None:
        require_int('period', self.period, 0)
        if self.merge_period is not None:
            if self.period == 0:
                raise ValueError('merge_period makes no sense with period=0, which trains both sides jointly.')
            require_int('merge_period', self.merge_period, 1)

    def phase(self, epoch: int) -> str:
        """The phase of an epoch, counted from 0: BACKBONE, MERGE or JOINT."""
        if self.period == 0:
            return self.constant
        cycle = self.period + (self.merge_period or self.period)
        return BACKBONE if epoch % cycle < self.period else MERGE


def require_int(name: str, value: object, least: int) -> None:
    """
    Raises:
        ValueError: The value is not a whole number, or below the least.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name} must be a whole number, at least {least}, got {value!r}')
