"""The alternating optimizer: backbone and merges train in turn.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.2.
"""
import difflib
import functools
import inspect
import logging
import weakref
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch.distributed as dist
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor
from torch.optim import Optimizer

from ..layers import merge_parameters, renew_compiled_guards
from ..models.builder import classifier_parameters
from .schedule import BACKBONE, JOINT, MERGE, PhaseSchedule, require_int

__all__ = ['Alternating', 'live', 'set_epoch']

_logger = logging.getLogger(__name__)

HEAD = 'head'  # side of a classifier that trains with the merges; it has no phase of its own

_live: 'weakref.WeakSet[Alternating]' = weakref.WeakSet()


class Alternating(Optimizer):
    """An optimizer of timm's registry that trains backbone and merges in turn.

    While one side trains, the other is frozen: it gets no gradient, no step, no weight decay and no momentum, and its
    optimizer state does not change (except for MADGRAD's step count, which both sides share).

    Its class is a subclass of the base's, so state, hooks and attributes are those of the base.

    Frozen parameters have `requires_grad` False until their phase comes, `unfreeze` is called, or the optimizer is
    deleted. What the user has frozen stays frozen.

    With `train` the merge phase never ends: the backbone is frozen from the start (only its BatchNorm statistics
    change, as in any merge phase), and `set_epoch` need not be called. DDP may wrap the model afterwards.

    Each parameter group is split by side, named in its key 'side'; its key 'epoch' saves the current epoch.
    torch.distributed.checkpoint loads only what was saved after each side has had a phase.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        base: Name of the optimizer in timm's registry.
        period: Epochs of a backbone phase (the paper's t), 3 if not given; 0 trains both sides jointly, as `base` does.
        merge_period: Epochs of a merge phase, as long as a backbone phase if not given.
        merge_lr_scale: Factor on the learning rate of the merges, in `step`: their groups' 'lr' stays the scheduler's.
        merge_weight_decay: Weight decay of the merges, that of their parameter group if not given.
        train: 'merge' trains only the merges, 'merge+head' only the merges and the classifier of an AWM model.
        **kwargs: lr, weight_decay, ... of the base optimizer, as for `timm.optim.create_optimizer_v2`.

    Raises:
        ValueError: There is nothing to train on a side, or another alternating optimizer has frozen it; the base is
            unknown; a parameter group has an argument that is the optimizer's; or another argument is out of range or
            contradicts `train`.
        TypeError: The base has no such argument.
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
        merge_lr_scale = float(merge_lr_scale)  # YAML reads 1e-4 as a string
        if not merge_lr_scale > 0:
            raise ValueError(f'merge_lr_scale must be above 0, got {merge_lr_scale}; for plain training use the base.')
        if merge_weight_decay is not None:
            merge_weight_decay = float(merge_weight_decay)
            if not merge_weight_decay >= 0:
                raise ValueError(f'merge_weight_decay must be at least 0, got {merge_weight_decay}')
        self._merge_lr_scale, self._merge_weight_decay = merge_lr_scale, merge_weight_decay
        if train not in (None, 'merge', 'merge+head'):
            raise ValueError(f"train must be 'merge' or 'merge+head', or not given, got {train!r}")
        if train is None:
            self.schedule = PhaseSchedule(3 if period is None else period, merge_period)
        elif period is None and merge_period is None:
            self.schedule = PhaseSchedule(0, constant=MERGE)
        else:
            raise ValueError(f'train={train} does not alternate: give it without period and merge_period.')
        self._with_head = train == 'merge+head'
        self._frozen: List[Tensor] = []  # by this optimizer; the same list for life
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{'params': params}]
        groups = [part for group in groups for part in self._split(group)]
        optimizer: Any = _create(groups, _known(base), kwargs)
        self.__dict__.update(optimizer.__dict__)
        self.__class__ = _class_over(self.__class__, optimizer.__class__)  # type: ignore[arg-type]
        self._patch_step_function()  # for hooks, which see all groups
        for group in self.param_groups:
            self._tune(group)
        thaw = 'If an earlier alternating optimizer has left this side frozen, call its unfreeze() first.'
        required = {
            MERGE: 'AWM merge to train among its parameters. Use a model with merges (awm_*, without awm=False, and '
                   'torch.compile in place of TorchScript), or train this one with its base alone: '
                   f'--opt {base}. {thaw}'}
        # what another optimizer has frozen thaws when that one is deleted, perhaps while this one trains
        if self.schedule.period or any(optimizer._frozen for optimizer in live()):
            required[BACKBONE] = (
                'backbone that requires gradients among its parameters. To train merges alone use train=merge. ' + thaw)
        if self._with_head:
            required[HEAD] = (
                'classifier to train among its parameters. train=merge+head needs an AWM model (awm_*) with '
                'num_classes above 0; to train merges alone use train=merge.')
        for side, missing in required.items():
            if not any(p.requires_grad for p in self._parameters(side)):
                raise ValueError(f'The alternating optimizer found no {missing}')
        if not self.schedule.period:
            self._freeze()
        self._enlist()

    def _enlist(self) -> None:
        _live.add(self)
        weakref.finalize(self, _thaw, self._frozen).atexit = False

    def __reduce__(self) -> Tuple[Any, ...]:
        return _blank, type(self).__bases__, self.__getstate__()

    def __getstate__(self) -> Dict[str, Any]:
        own = {name: getattr(self, name) for name in (
            'schedule', '_with_head', '_frozen', '_merge_lr_scale', '_merge_weight_decay')}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enlist()  # copied or unpickled

    @property
    def epoch(self) -> Optional[int]:
        """The current epoch, from 0; None before the first `set_epoch`."""
        return self.param_groups[0]['epoch'] if self.param_groups else None

    @property
    def phase(self) -> str:
        """The phase of the current epoch: 'backbone', 'merge' or 'joint'.

        Raises:
            RuntimeError: `set_epoch` has not been called.
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
        """Start an epoch, counted from 0: freezes the side that does not train in it.

        Call it before the epoch's first forward pass, and after wrapping the model in DDP.

        Raises:
            ValueError: The epoch is not a whole number of at least 0.
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
        """Undo the freezing, after the training; `set_epoch` freezes again."""
        _thaw(self._frozen)
        renew_compiled_guards(self._parameters(MERGE))

    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        if self.epoch is None and not any(
                group['lr'] or any(p.grad is not None and p.grad.any() for p in group['params'])
                for group in self.param_groups):
            return self._base_step(closure)  # changes nothing: torch.distributed.checkpoint creates the state so
        idle = self._idle
        for p in self._parameters(idle):
            p.grad = None  # computed before the freeze, or put there by DDP
        groups = self.param_groups
        # hidden from the base, as some optimizers count steps per group
        self.param_groups = [group for group in groups if group['side'] != idle]
        scale = self._merge_lr_scale
        scaled = [(group, group['lr']) for group in self.param_groups if group['side'] == MERGE and scale != 1]
        try:
            for group, lr in scaled:
                group['lr'] = lr * scale
            return self._base_step(closure)
        finally:
            self.param_groups = groups
            for group, lr in scaled:
                group['lr'] = lr

    def _base_step(self, closure: Optional[Callable[[], float]]) -> Optional[float]:
        return super().step.__wrapped__(self, closure)  # type: ignore[attr-defined]  # without its hooks

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        for part in self._split(param_group):
            super().add_param_group({**part, 'epoch': self.epoch})
            self._tune(self.param_groups[-1])
        if self._frozen:
            self._freeze()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load a state; the saved epoch goes on.

        Except with `train`, no side is frozen before the next `set_epoch`: DDP, which may wrap the model in between,
        ignores frozen parameters for good.

        Raises:
            ValueError: The state is that of another optimizer or of other parameter groups.
        """
        sides = [group.get('side') for group in state_dict['param_groups']]
        if sides != [group['side'] for group in self.param_groups]:
            raise ValueError(
                'This optimizer state was not saved by an alternating optimizer of the same model and the same '
                'parameter groups. Resume with the --opt that the run was started with, or with --no-resume-opt.')
        super().load_state_dict(state_dict)
        if self.schedule.period:
            self.unfreeze()

    @property
    def _idle(self) -> Optional[str]:
        return {BACKBONE: MERGE, MERGE: BACKBONE, JOINT: None}[self.phase]

    def _parameters(self, side: Optional[str]) -> List[Tensor]:
        return [p for group in self.param_groups if group['side'] == side for p in group['params']]

    def _split(self, group: Dict[str, Any]) -> List[Dict[str, Any]]:
        """One parameter group for each side that has parameters in the group."""
        own = group.keys() & {'base', 'period', 'merge_period', 'merge_lr_scale', 'merge_weight_decay', 'train'}
        if own:
            raise ValueError(
                f'A parameter group has no {min(own)} of its own: give it to the alternating optimizer as a whole. '
                'ZeroRedundancyOptimizer, which hands such arguments to groups, cannot hold it; DDP works.')
        params = group['params']
        params = [params] if isinstance(params, Tensor) else list(params)
        side_of = {id(p): MERGE for p in merge_parameters()}
        if self._with_head:
            side_of.update((id(p), HEAD) for p in classifier_parameters())
        sides: Dict[str, List[Any]] = {BACKBONE: [], MERGE: [], HEAD: []}
        for param in params:
            tensor = param[1] if isinstance(param, tuple) else param  # a pair of named_parameters()
            sides[side_of.get(id(tensor), BACKBONE)].append(param)
        return [{'epoch': None, **group, 'params': members, 'side': side} for side, members in sides.items() if members]

    def _tune(self, group: Dict[str, Any]) -> None:
        """Sets the weight decay of a new group of merges."""
        if group['side'] != MERGE:
            return
        if self._merge_lr_scale != 1 and group['lr'] is None:  # Adafactor finds its own
            raise ValueError('merge_lr_scale needs a learning rate to scale: give lr.')
        if self._merge_weight_decay is not None:
            group['weight_decay'] = self._merge_weight_decay

    def _freeze(self) -> None:
        self.unfreeze()
        self._frozen += [p for p in self._parameters(self._idle) if p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
            p.grad = None


@functools.lru_cache(maxsize=None)
def _class_over(own_class: Any, base_class: Any) -> Any:
    return type(own_class.__name__ + base_class.__name__, (own_class, base_class), {})


def _blank(*classes: Any) -> Optimizer:
    cls = _class_over(*classes)
    return cls.__new__(cls)


def live() -> List[Alternating]:
    """The alternating optimizers of this process."""
    return list(_live)


def set_epoch(epoch: int) -> None:
    """Start an epoch in every alternating optimizer of this process, also inside Lookahead."""
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


def _create(groups: List[Any], base: str, kwargs: Dict[str, Any]) -> Optimizer:
    try:
        return create_optimizer_v2(groups, opt=base, **kwargs)
    except TypeError as error:
        functions = Alternating, create_optimizer_v2, get_optimizer_class(base, bind_defaults=False)
        parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
        known = [p.name for p in parameters if p.default is not p.empty]
        for key in kwargs:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise TypeError(
                    f'Neither the alternating optimizer nor its base {base} takes {key!r}; the nearest is {nearest!r}.'
                ) from error
        raise
