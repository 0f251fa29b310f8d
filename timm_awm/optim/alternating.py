"""The alternating optimizer: backbone and merges take turns.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.2.
"""
import difflib
import logging
import weakref
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import torch.distributed as dist
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.optim import Optimizer

from ..layers import merge_parameters
from ..models.builder import classifier_parameters
from .schedule import BACKBONE, JOINT, MERGE, PhaseSchedule, require_int

__all__ = ['Alternating', 'live', 'set_epoch']

_logger = logging.getLogger(__name__)

HEAD = 'head'  # the side of a classifier that trains with the merges; it has no phase of its own

_live: 'weakref.WeakSet[Alternating]' = weakref.WeakSet()


class Alternating(Optimizer):
    """Wraps an optimizer of timm's registry and trains backbone and merges alternately.

    While one side trains the other is frozen: no gradient is computed for it, it takes no step, no weight decay and no
    momentum, and its optimizer state waits unchanged. (What an optimizer counts for itself as a whole and not for a
    parameter or a group, as MADGRAD does, goes on counting.)

    Frozen parameters have `requires_grad` False until their phase comes, or `unfreeze` is called, or the optimizer is
    gone. Parameters that are frozen already when a phase begins stay so.

    With `train` one merge phase lasts for ever: the backbone is frozen from the start (its BatchNorm statistics follow
    train mode, as in any merge phase), and nobody needs to call `set_epoch`. As it never thaws, DDP may wrap the model
    after that.

    Each parameter group is split, one for each side, marked by its key 'side'. Its key 'epoch' is the current
    epoch, so that whatever saves and loads parameter groups (`state_dict`, torch.distributed.checkpoint) keeps it. The
    latter expects state of all parameters: it loads what was saved after each side has had a phase.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        base: Name of the optimizer in timm's registry.
        period: Epochs of a backbone phase (the paper's t), 3 if not given; 0 trains both sides jointly, which is
            `base` itself.
        merge_period: Epochs of a merge phase, as long as a backbone phase if not given.
        merge_lr_scale: The merges' learning rate, as a multiple of the one of their parameter group.
        merge_weight_decay: The merges' weight decay, that of their parameter group if not given.
        train: In place of turns, 'merge' trains the merges alone, 'merge+head' the merges and the classifier of an AWM
            model, which is a new one where the data have other classes than the checkpoint.
        **kwargs: lr, weight_decay, ... of the base optimizer, as for `timm.optim.create_optimizer_v2`.

    Raises:
        ValueError: A side that is to be trained has no parameter to train, or another alternating optimizer has frozen
            it; the base or `train` is unknown; a period is no number of epochs, or given together with `train`; the
            learning rate is scaled by no positive number, or there is none to scale; or the weight decay is negative.
    """

    def __init__(
            self,
            params: Iterable[Any],
            base: str = 'sgd',
            period: Optional[int] = None,
            merge_period: Optional[int] = None,
            merge_lr_scale: float = 1.0,
            merge_weight_decay: Optional[float] = None,
            train: Optional[str] = None,
            **kwargs: Any,
    ) -> None:
        merge_lr_scale = float(merge_lr_scale)  # YAML has 1e-4 as a text
        if not merge_lr_scale > 0:
            raise ValueError(
                f'merge_lr_scale must be above 0, got {merge_lr_scale}; to train no merges use the base alone.')
        if merge_weight_decay is not None:
            merge_weight_decay = float(merge_weight_decay)
            if not merge_weight_decay >= 0:
                raise ValueError(f'merge_weight_decay must be at least 0, got {merge_weight_decay}')
        self._merge_lr_scale, self._merge_weight_decay = merge_lr_scale, merge_weight_decay
        if train is None:
            self.schedule = PhaseSchedule(3 if period is None else period, merge_period)
        elif train not in ('merge', 'merge+head'):
            raise ValueError(f"train must be 'merge' or 'merge+head', or not given, got {train!r}")
        elif period is None and merge_period is None:
            self.schedule = PhaseSchedule(0, constant=MERGE)
        else:
            raise ValueError(f'train={train} takes no turns: give it without period and merge_period.')
        self._with_head = train == 'merge+head'
        self._frozen: List[Tensor] = []  # by this optimizer; the same list for life
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{'params': params}]
        groups = [part for group in groups for part in self._split(group)]
        self.base = create_optimizer_v2(groups, opt=_known(base), **kwargs)
        for group in self.base.param_groups:
            self._tune(group)
        super().__init__(self.base.param_groups, self.base.defaults)
        # one list and one state for both: what schedulers, scalers and users change here, the base sees
        self._share()
        thaw = 'If an earlier alternating optimizer has left this side frozen, call its unfreeze() first.'
        if not any(p.requires_grad for p in self._parameters(MERGE)):
            raise ValueError(
                'The alternating optimizer found no AWM merge to train among its parameters. Use a model with merges '
                '(awm_*, without awm=False, and torch.compile in place of TorchScript), or train this one with its '
                f'base alone: --opt {base}. {thaw}')
        # what another has frozen thaws when that one is gone, perhaps in the middle of this one's training
        needed = self.schedule.period or any(optimizer._frozen for optimizer in live())
        if needed and not any(p.requires_grad for p in self._parameters(BACKBONE)):
            raise ValueError(
                'The alternating optimizer found no backbone that requires gradients among its parameters. To train '
                f'merges alone use train=merge. {thaw}')
        if self._with_head and not any(p.requires_grad for p in self._parameters(HEAD)):
            raise ValueError(
                'The alternating optimizer found no classifier to train among its parameters. train=merge+head needs '
                'an AWM model (awm_*) with num_classes above 0; to train merges alone use train=merge.')
        if not self.schedule.period:
            self._freeze()
        self._enlist()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _enlist(self) -> None:
        _live.add(self)
        weakref.finalize(self, _thaw, self._frozen).atexit = False

    def __getstate__(self) -> Dict[str, Any]:
        own = {name: getattr(self, name) for name in (
            'base', 'schedule', '_with_head', '_frozen', '_merge_lr_scale', '_merge_weight_decay')}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enlist()  # copied or unpickled

    @property
    def is_second_order(self) -> bool:
        return getattr(self.base, 'is_second_order', False)

    @property
    def epoch(self) -> Optional[int]:
        """The current epoch, counted from 0; None before the first `set_epoch`."""
        return self.param_groups[0]['epoch'] if self.param_groups else None

    @property
    def phase(self) -> str:
        """The phase of the current epoch: 'backbone', 'merge' or 'joint'.

        Raises:
            RuntimeError: Nobody has said which epoch it is.
        """
        if self.schedule.period == 0:
            return self.schedule.constant
        if self.epoch is None:
            raise RuntimeError(
                "The alternating optimizer does not know the epoch. timm's train.py tells it if timm_awm is imported "
                'through --device-modules timm_awm and not before; any other training loop calls '
                'optimizer.set_epoch(epoch) at the start of each epoch, before its first forward pass.')
        return self.schedule.phase(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, counted from 0: freezes the side that is not to be trained in it.

        Call it before the epoch's first forward pass, and after a model has been wrapped in DDP.

        Raises:
            ValueError: The epoch is no whole number of at least 0.
        """
        require_int('epoch', epoch, 0)
        for group in self.param_groups:
            group['epoch'] = int(epoch)
        self._freeze()
        params = [p for group in self.param_groups for p in group['params']]
        total, trained = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            _logger.info(f'Epoch {epoch}: {self.phase} phase, trains {trained:,} of {total:,} parameters')

    def unfreeze(self) -> None:
        """Give back what the optimizer has frozen, for what comes after the training; `set_epoch` freezes again."""
        _thaw(self._frozen)

    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        if self.epoch is None and not any(
                group['lr'] or any(p.grad is not None and p.grad.any() for p in group['params'])
                for group in self.param_groups):
            return self.base.step(closure)  # moves nothing: torch.distributed.checkpoint creates the state so
        idle = self._idle
        for p in self._parameters(idle):
            p.grad = None  # computed before the freeze, or put there by DDP
        groups = self.base.param_groups
        # out of the base's sight, as some optimizers count steps per group
        self.base.param_groups = [group for group in groups if group['side'] != idle]
        try:
            return self.base.step(closure)
        finally:
            self.base.param_groups = groups

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        for part in self._split(param_group):
            super().add_param_group({**part, 'epoch': self.epoch})
            self._tune(self.param_groups[-1])
        if self._frozen:
            self._freeze()

    def state_dict(self) -> Dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As of any optimizer. Steps go on in the saved epoch; where sides take turns, gradients are computed for both
        until `set_epoch` freezes one, for DDP, if it is to come, must not find a side frozen that will thaw.

        Raises:
            ValueError: The state was saved from an optimizer of other parameter groups, such as a bare base.
        """
        sides = [group.get('side') for group in state_dict['param_groups']]
        if sides != [group['side'] for group in self.param_groups]:
            raise ValueError(
                'This optimizer state was not saved by an alternating optimizer of the same model and the same '
                'parameter groups. Resume with the --opt that the run was started with, or with --no-resume-opt.')
        self.base.load_state_dict(state_dict)
        self._share()
        if self.schedule.period:
            self.unfreeze()

    @property
    def _idle(self) -> Optional[str]:
        return {BACKBONE: MERGE, MERGE: BACKBONE, JOINT: None}[self.phase]

    def _parameters(self, side: Optional[str]) -> List[Tensor]:
        return [p for group in self.param_groups if group['side'] == side for p in group['params']]

    def _split(self, group: Dict[str, Any]) -> List[Dict[str, Any]]:
        """A parameter group as one for each side, as far as it has parameters of that."""
        if 'side' in group:
            return [group]
        params = group['params']
        params = [params] if isinstance(params, Tensor) else list(params)
        side_of = {id(p): MERGE for p in merge_parameters()}
        if self._with_head:
            side_of.update((id(p), HEAD) for p in classifier_parameters())
        sides: Dict[str, List[Union[Tensor, Tuple[str, Tensor]]]] = {BACKBONE: [], MERGE: [], HEAD: []}
        for param in params:
            tensor = param[1] if isinstance(param, tuple) else param  # of named_parameters()
            sides[side_of.get(id(tensor), BACKBONE)].append(param)
        return [{'epoch': None, **group, 'params': members, 'side': side} for side, members in sides.items() if members]

    def _tune(self, group: Dict[str, Any]) -> None:
        """Gives a new parameter group, complete but for that, what is set for its side."""
        if group['side'] == MERGE:
            if self._merge_lr_scale != 1:
                if group['lr'] is None:  # Adafactor's own
                    raise ValueError('merge_lr_scale needs a learning rate to scale: give lr.')
                group['lr'] = group['lr'] * self._merge_lr_scale
            if self._merge_weight_decay is not None:
                group['weight_decay'] = self._merge_weight_decay

    def _freeze(self) -> None:
        self.unfreeze()
        self._frozen += [p for p in self._parameters(self._idle) if p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
            p.grad = None


def live() -> List[Alternating]:
    """The alternating optimizers of this process."""
    return list(_live)


def set_epoch(epoch: int) -> None:
    """Tell every alternating optimizer of this process which epoch starts, those inside a Lookahead too."""
    for optimizer in live():
        optimizer.set_epoch(epoch)


def _thaw(frozen: List[Tensor]) -> None:
    for p in frozen:
        p.requires_grad_(True)
    frozen.clear()


def _known(base: str) -> str:
    names = [name for name in list_optimizers() if name != 'alternating']
    lower = str(base).lower()  # as timm does with --opt
    if lower in names:
        return lower
    nearest = difflib.get_close_matches(lower.rpartition('_')[2], names, n=1, cutoff=0)
    hint = '; for lookahead use --opt lookahead_alternating' if lower.startswith('lookahead_') else ''
    raise ValueError(
        f'Unknown base optimizer {base!r}, the nearest is {nearest[0]!r}{hint}. '
        'timm.optim.list_optimizers() lists them all.')
