"""The alternating optimizer: backbone and merges take turns.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.2.
"""
import difflib
import logging
import weakref
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch.distributed as dist
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.optim import Optimizer

from ..layers import merge_parameters
from .schedule import BACKBONE, JOINT, MERGE, PhaseSchedule

__all__ = ['Alternating', 'set_epoch']

_logger = logging.getLogger(__name__)

_live: 'weakref.WeakSet[Alternating]' = weakref.WeakSet()


class Alternating(Optimizer):
    """Wraps an optimizer of timm's registry and trains backbone and merges alternately.

    While one side trains the other is frozen: no gradient is computed for it, it takes no step, no weight decay and no
    momentum, and its optimizer state waits unchanged. (What an optimizer counts for itself as a whole and not for a
    parameter or a group, as MADGRAD does, goes on counting.)

    Each parameter group is split in two, one for each side, marked by its key 'side'.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        base: Name of the optimizer in timm's registry.
        period: Epochs of a backbone phase (the paper's t); 0 trains both sides jointly, which is `base` itself.
        merge_period: Epochs of a merge phase, as long as a backbone phase if not given.
        **kwargs: lr, weight_decay, ... of the base optimizer, as for `timm.optim.create_optimizer_v2`.

    Raises:
        ValueError: No parameter belongs to a merge; the base is unknown; a period is not a number of epochs.
    """

    def __init__(
            self,
            params: Iterable[Any],
            base: str = 'sgd',
            period: int = 3,
            merge_period: Optional[int] = None,
            **kwargs: Any,
    ) -> None:
        self.schedule = PhaseSchedule(period, merge_period)
        self.epoch: Optional[int] = None
        self._idle: Optional[str] = None
        self._frozen: List[Tensor] = []
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{'params': params}]
        groups = [part for group in groups for part in _split(group)]
        if not any(group['side'] == MERGE for group in groups):
            raise ValueError(
                'The alternating optimizer found no AWM merge among the parameters it was given. Use a model with '
                "merges (awm_*, without awm=False, and torch.compile in place of TorchScript), or train this one with "
                f"its base alone: --opt {base}")
        self.base = create_optimizer_v2(groups, opt=_known(base), **kwargs)
        super().__init__(self.base.param_groups, self.base.defaults)
        # one list and one state for both: what schedulers, scalers and users change here, the base sees
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        _live.add(self)

    @property
    def is_second_order(self) -> bool:
        return getattr(self.base, 'is_second_order', False)

    @property
    def phase(self) -> str:
        """The phase of the current epoch: 'backbone', 'merge' or 'joint'.

        Raises:
            RuntimeError: Nobody has said which epoch it is.
        """
        if self.schedule.period == 0:
            return JOINT
        if self.epoch is None:
            raise RuntimeError(
                'The alternating optimizer does not know the epoch. timm\'s train.py tells it; any other training '
                'loop calls optimizer.set_epoch(epoch) at the start of each epoch, before its first forward pass.')
        return self.schedule.phase(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, counted from 0: freezes the side that is not to be trained in it.

        Call it before the epoch's first forward pass, and after a model has been wrapped in DDP.
        """
        self.epoch = epoch
        self._freeze()
        sizes = {side: sum(p.numel() for p in self._parameters(side)) for side in (BACKBONE, MERGE)}
        trained = sizes.get(self.phase, sum(sizes.values()))
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            _logger.info(f'Epoch {epoch}: {self.phase} phase, trains {trained:,} of {sum(sizes.values()):,} parameters')

    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        idle = self._freeze()
        groups = self.base.param_groups
        # out of the base's sight, as some optimizers count steps per group
        self.base.param_groups = [group for group in groups if group['side'] != idle]
        try:
            return self.base.step(closure)
        finally:
            self.base.param_groups = groups

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        for part in _split(param_group):
            super().add_param_group(part)

    def state_dict(self) -> Dict[str, Any]:
        state_dict = self.base.state_dict()
        phase = None if self.epoch is None else self.phase
        return {**state_dict, 'alternating': {'epoch': self.epoch, 'phase': phase}}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As of any optimizer. Goes on in the saved epoch until `set_epoch` says otherwise.

        Raises:
            ValueError: The state was saved from an optimizer of other parameter groups, such as a bare base.
        """
        sides = [group.get('side') for group in state_dict['param_groups']]
        if sides != [group['side'] for group in self.param_groups]:
            raise ValueError(
                'This optimizer state was not saved by an alternating optimizer of the same model and the same '
                'parameter groups. Resume with the --opt that the run was started with, or with --no-resume-opt.')
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.epoch = state_dict['alternating']['epoch']

    def _parameters(self, side: Optional[str]) -> Iterator[Tensor]:
        return (p for group in self.param_groups if group['side'] == side for p in group['params'])

    def _freeze(self) -> Optional[str]:
        """Freezes the idle side, returns which it is."""
        idle = {BACKBONE: MERGE, MERGE: BACKBONE, JOINT: None}[self.phase]
        if idle != self._idle:
            for p in self._frozen:
                p.requires_grad_(True)
            self._frozen = [p for p in self._parameters(idle) if p.requires_grad]  # not what a user has frozen himself
            for p in self._frozen:
                p.requires_grad_(False)
            self._idle = idle
        for p in self._parameters(idle):
            p.grad = None  # computed before the freeze, or put there by DDP
        return idle


def set_epoch(epoch: int) -> None:
    """Tell every alternating optimizer of this process which epoch starts."""
    for optimizer in list(_live):
        optimizer.set_epoch(epoch)


def _split(group: Dict[str, Any]) -> List[Dict[str, Any]]:
    """A parameter group as one of backbone and one of merge parameters, as far as it has such."""
    if 'side' in group:
        return [group]
    params = group['params']
    params = [params] if isinstance(params, Tensor) else list(params)
    of_merges = {id(p) for p in merge_parameters()}
    sides: Dict[str, List[Union[Tensor, Tuple[str, Tensor]]]] = {BACKBONE: [], MERGE: []}
    for param in params:
        tensor = param[1] if isinstance(param, tuple) else param  # of named_parameters()
        sides[MERGE if id(tensor) in of_merges else BACKBONE].append(param)
    return [{**group, 'params': members, 'side': side} for side, members in sides.items() if members]


def _known(base: str) -> str:
    names = [name for name in list_optimizers() if name != 'alternating']
    if base in names:
        return base
    nearest = difflib.get_close_matches(str(base).rpartition('_')[2], names, n=1, cutoff=0)
    hint = '; for lookahead use --opt lookahead_alternating' if str(base).startswith('lookahead_') else ''
    raise ValueError(
        f'Unknown base optimizer {base!r}, the nearest is {nearest[0]!r}{hint}. '
        'timm.optim.list_optimizers() lists them all.')
