"""The alternating optimizer: epochs that train the backbone, then epochs that train the merges.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.2.
"""
import logging
import weakref
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch.distributed as dist
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.optim import Optimizer

from ..layers import merge_parameters, renew_compiled_guards
from .idle import freeze, thaw
from .schedule import BACKBONE, JOINT, MERGE, PhaseSchedule, require_int

_logger = logging.getLogger(__name__)
_live: 'weakref.WeakSet[Alternating]' = weakref.WeakSet()
_IDLE = {BACKBONE: MERGE, MERGE: BACKBONE, JOINT: None}
_OPTIONS = ('base', 'period', 'merge_period')  # in defaults and groups, as torch's optimizers have theirs


class Alternating(Optimizer):
    """Trains backbone and merges in alternating epochs, with any optimizer of timm's registry.

    While one side trains, the other is frozen: `requires_grad` is False, there is no step, weight decay or momentum,
    and its optimizer state waits (except for MADGRAD's step count, which both share). It thaws when its phase comes,
    by `unfreeze`, when the optimizer is deleted, or another one is made over it. What the user freezes, before or
    meanwhile, stays frozen. Copies of a model are not frozen.

    Each parameter group is split by side, named in its key 'side'; its key 'epoch' saves the current epoch.
    torch.distributed.checkpoint loads only what was saved after each side has had a phase. Hooks of `step` get this
    optimizer, those of `state_dict` and `load_state_dict` its base.

    Args:
        params: Parameters or parameter groups. Groups of another alternating optimizer bring its base, periods, epoch.
        base: Name of the optimizer in timm's registry.
        period: Epochs of a backbone phase (the paper's t); 0 trains both sides jointly, as `base` does.
        merge_period: Epochs of a merge phase (default: as long as a backbone phase).
        **kwargs: lr, weight_decay, ... of the base, as for `timm.optim.create_optimizer_v2`.

    Raises:
        ValueError: There is nothing to train on a side, or an argument, also of a parameter group, is wrong.
    """

    def __init__(
            self,
            params: Iterable[Any],
            base: str = 'sgd',
            period: int = 3,
            merge_period: Optional[int] = None,
            **kwargs: Any,
    ) -> None:
        params = list(params)
        groups: List[Any] = params if params and isinstance(params[0], dict) else [{'params': params}]
        if 'side' in groups[0]:
            base, period, merge_period = (groups[0][option] for option in _OPTIONS)
        base = str(base).lower()  # as timm does with --opt
        if base == 'alternating' or base not in list_optimizers():
            raise ValueError(
                f'Unknown base optimizer {base!r}: timm.optim.list_optimizers() lists them. '
                'For lookahead use --opt lookahead_alternating.')
        options = dict(base=base, period=period, merge_period=merge_period)
        groups = [{**part, **options} for group in groups for part in _split(group)]
        optimizer = create_optimizer_v2(groups, opt=base, **kwargs)
        optimizer.defaults.update(options)
        params = {p: group['side'] for group in optimizer.param_groups for p in group['params']}
        others = [other for other in live() if not params.keys().isdisjoint(other._parameters())]
        left_out = {p for other in others for p in other._frozen} - params.keys()
        for other in others:
            other.unfreeze()
        if left_out:
            raise ValueError(
                'An earlier alternating optimizer had frozen parameters of this model, and so they were left out here. '
                'They are thawed now: make the optimizer again.')
        for side in (MERGE, BACKBONE) if period else (MERGE,):
            if not any(p.requires_grad for p in params if params[p] == side):
                raise ValueError(
                    f'The alternating optimizer found no {side} parameters that require gradients. Use a model with '
                    'merges (awm_*, without awm=False, and torch.compile in place of TorchScript), or train this one '
                    f'with its base alone: --opt {base}.')
        _live.difference_update(others)
        self.__setstate__({'base': optimizer})

    base: Any
    # the base's, also where a user resets it
    state = property(lambda self: self.base.state, lambda self, state: setattr(self.base, 'state', state))

    def __getstate__(self) -> Dict[str, Any]:
        return {'base': self.base}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        base = state['base']
        hooks = {name: hooks for name, hooks in vars(base).items() if 'state_dict' in name}
        super().__setstate__({**hooks, 'base': base, 'defaults': base.defaults, 'param_groups': base.param_groups})
        self.is_second_order = getattr(base, 'is_second_order', False)  # train.py asks for it
        self.schedule = PhaseSchedule(self.defaults['period'], self.defaults['merge_period'])
        self._frozen: List[Tensor] = []  # by this optimizer; the same list for life
        weakref.finalize(self, thaw, self._frozen).atexit = False
        _live.add(self)

    @property
    def epoch(self) -> Optional[int]:
        """The current epoch, from 0; None before the first `set_epoch`."""
        return self.param_groups[0]['epoch']

    @property
    def phase(self) -> str:
        """The phase of the current epoch: 'backbone', 'merge' or 'joint'. A RuntimeError without an epoch."""
        if self.schedule.period and self.epoch is None:
            raise RuntimeError(
                "The alternating optimizer does not know the epoch. timm's train.py tells it if --device-modules "
                'timm_awm imports the package first; any other training loop calls optimizer.set_epoch(epoch) at the '
                'start of each epoch, before its first forward pass.')
        return self.schedule.phase(self.epoch or 0)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, counted from 0: freezes the side that does not train in it.

        Call it before the epoch's first forward pass, and after wrapping the model in DDP.

        Raises:
            ValueError: The epoch is not a whole number of at least 0.
        """
        require_int('epoch', epoch, 0)
        for group in self.param_groups:
            group['epoch'] = int(epoch)
        self._freeze()
        total = sum(p.numel() for p in self._parameters())
        trained = sum(p.numel() for p in self._parameters() if p.requires_grad)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            _logger.info(f'Epoch {epoch}: {self.phase} phase, trains {trained:,} of {total:,} parameters')

    def unfreeze(self) -> None:
        """Undo the freezing, after the training; `set_epoch` freezes again."""
        thaw(self._frozen)
        self._frozen.clear()
        renew_compiled_guards(self._parameters(MERGE))

    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        if self.epoch is None and not self.state and all(group['lr'] == 0 for group in self.param_groups):
            return self.base.step(closure)  # changes nothing: torch.distributed.checkpoint creates the state so
        idle = _IDLE[self.phase]
        for p in self._parameters(idle) if idle else []:
            p.grad = None  # computed before the freeze, or put there by DDP
        # hidden from the base, as some optimizers count steps per group
        self.base.param_groups = [group for group in self.param_groups if group['side'] != idle]
        try:
            return self.base.step(closure)
        finally:
            self.base.param_groups = self.param_groups

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        for part in _split(param_group):
            self.base.add_param_group(part)
        if self._frozen:
            self._freeze()

    def state_dict(self) -> Dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load a state. No side is frozen before the next `set_epoch`: DDP, which may wrap the model in between,
        ignores frozen parameters for good.

        Raises:
            ValueError: The state is that of another optimizer, base, periods or parameter groups.
        """
        for key in ('side', *_OPTIONS):
            saved, own = (
                [group.get(key) for group in groups] for groups in (state_dict['param_groups'], self.param_groups))
            if saved != own:
                raise ValueError(
                    f'This optimizer state does not fit: {key} of its parameter groups is {saved}, here it is {own}. '
                    'Resume with the --opt and --opt-kwargs that the run was started with, or with --no-resume-opt.')
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        self.unfreeze()

    def _parameters(self, side: Optional[str] = None) -> List[Tensor]:
        return [p for group in self.param_groups if side in (None, group['side']) for p in group['params']]

    def _freeze(self) -> None:
        self.unfreeze()
        idle = _IDLE[self.phase]
        self._frozen += [p for p in self._parameters(idle) if p.requires_grad] if idle else []
        freeze(self._frozen)


def live() -> List[Alternating]:
    """The alternating optimizers of this process, without those whose parameters went to a newer one."""
    return list(_live)


def set_epoch(epoch: int) -> None:
    """Start an epoch in every alternating optimizer of this process, also inside Lookahead."""
    for optimizer in live():
        optimizer.set_epoch(epoch)


def _split(group: Dict[str, Any]) -> List[Dict[str, Any]]:
    """One parameter group for each side that has parameters in the group."""
    own = group.keys() & set(_OPTIONS)
    if own and 'side' not in group:
        raise ValueError(
            f'A parameter group has no {min(own)} of its own: give it to the alternating optimizer as a whole. '
            'ZeroRedundancyOptimizer, which hands such arguments to groups, cannot hold it; DDP works.')
    params = [group['params']] if isinstance(group['params'], Tensor) else list(group['params'])
    merges = {id(p) for p in merge_parameters()}
    sides: Dict[str, List[Any]] = {BACKBONE: [], MERGE: []}
    for param in params:
        tensor = param[1] if isinstance(param, tuple) else param  # of named_parameters()
        sides[MERGE if id(tensor) in merges else BACKBONE].append(param)
    return [{'epoch': None, **group, 'params': members, 'side': side} for side, members in sides.items() if members]
