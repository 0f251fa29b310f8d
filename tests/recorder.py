"""Notes at every update of a training run what it has changed, from outside the optimizer."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional
from unittest.mock import patch

import timm.utils
import torch
from timm.utils import NativeScaler, unwrap_model

# (epoch, update) whose gradients are infinite under float16: at phase changes, and one epoch whole
OVERFLOWS = {(0, 2), (1, 0), (2, 0), (2, 1), (2, 2)}


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


class Scaler(NativeScaler):
    """train.py has a scaler on CUDA only; this one is for the CPU and overflows as told."""

    def __init__(self, overflows: Callable[[], bool], skipped: Callable[[], None]) -> None:
        super().__init__(device='cpu')
        self._scaler = torch.amp.GradScaler('cpu', init_scale=256.)
        self.overflows, self.skipped = overflows, skipped

    def __call__(self, loss: torch.Tensor, optimizer: Any, need_update: bool = True, **kwargs: Any) -> None:
        loss = loss * float('inf') if self.overflows() else loss
        super().__call__(loss, optimizer, need_update=need_update, **kwargs)
        if need_update:
            self.skipped()


class Recorder:
    """Stands in for train.py's `train_one_epoch`.

    A note is written when an epoch begins, after every update that takes a step or skips it, and when an epoch ends.
    'moved', 'state' and 'buffers' name what has changed since the note before, whoever changed it.
    """

    def __init__(self, train_one_epoch: Callable, note: Callable[[Dict[str, Any]], Any]) -> None:
        self.train_one_epoch, self.note = train_one_epoch, note
        self.scaler: Optional[Scaler] = None
        self.before: Optional[Dict[str, Dict[str, Any]]] = None  # as of the last note, of this kind:
        self.last = ''
        self.clip: Optional[Dict[str, Any]] = None

    def __call__(
            self, epoch: int, model: Any, loader: Any, optimizer: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        self.epoch, self.update, self.optimizer = epoch, 0, optimizer
        self.model = unwrap_model(model)
        task_ema = getattr(kwargs.get('task'), 'trainable_module_ema', None)
        ema = task_ema if kwargs.get('model_ema') is None else kwargs['model_ema']
        self.ema, self.decay = None if ema is None else unwrap_model(ema), args.model_ema_decay
        self.updates_per_epoch = -(-len(loader) // args.grad_accum_steps)
        if args.amp and args.amp_dtype == 'float16':
            self.scaler = self.scaler or Scaler(
                lambda: (self.epoch, self.update) in OVERFLOWS, self.count_skipped)
            kwargs['loss_scaler'] = self.scaler
        self.record('begin')
        with self.watched_step(), self.watched_clipping():
            result = self.train_one_epoch(epoch, model, loader, optimizer, args, *rest, **kwargs)
        self.record('end')
        return result

    @property
    def base(self) -> Any:
        return getattr(self.optimizer, '_base_optimizer', self.optimizer)  # inside a Lookahead

    def tensors(self) -> Dict[str, Dict[str, Any]]:
        return dict(
            moved=copied(dict(self.model.named_parameters())),
            state=copied({k: self.base.state.get(p, {}) for k, p in self.model.named_parameters()}),
            buffers=copied(dict(self.model.named_buffers())),
            ema={} if self.ema is None else copied(dict(self.ema.named_parameters())),
        )

    def record(self, kind: str, **more: Any) -> None:
        now = self.tensors()
        before = now if self.before is None else self.before
        changes = {k: [name for name in now[k] if not same(now[k][name], before[k].get(name))] for k in now}
        note = dict(kind=kind, epoch=self.epoch, **changes, **more)
        if kind == 'begin':
            note.update(
                parameters=list(now['moved']),
                all_buffers=list(now['buffers']),
                frozen=[k for k, p in self.model.named_parameters() if not p.requires_grad],
                stateful=[k for k, state in now['state'].items() if state],
                has_ema=self.ema is not None,
                ema_differs=any(not same(v, now['moved'][k]) for k, v in now['ema'].items()),
            )
        else:
            # the average has been updated since, if the note before was of an update, with the weights of then
            weight = 0. if self.last == 'begin' else 1. - self.ema_decay(self.update)
            expected = {k: v.lerp(before['moved'][k], weight) for k, v in before['ema'].items()}
            errors = [(now['ema'][k] - v).abs().max() for k, v in expected.items()]
            note.update(ema_error=float(max(errors, default=0.)))
        self.note(note)
        self.before, self.last = now, kind

    def ema_decay(self, updates_of_epoch: int) -> float:
        updates = self.epoch * self.updates_per_epoch + updates_of_epoch
        return 0. if updates <= 1 else self.decay  # timm's average begins as a copy

    @contextmanager
    def watched_step(self) -> Iterator[None]:
        step = self.optimizer.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            more = dict(
                gradients=[k for k, p in self.model.named_parameters() if p.grad is not None],
                lr=[group['lr'] / group.get('lr_scale', 1.) for group in self.optimizer.param_groups],
                clock=getattr(self.base, 'epoch', None),
                clip=self.clip,
            )
            result = step(*args, **kwargs)
            self.record('step', **more)
            self.update += 1
            self.stepped, self.clip = True, None
            return result

        self.stepped = False
        self.optimizer.step = watched
        try:
            yield
        finally:
            del self.optimizer.step

    def count_skipped(self) -> None:
        if not self.stepped:
            self.record('skip')
            self.update += 1
        self.stepped, self.clip = False, None

    @contextmanager
    def watched_clipping(self) -> Iterator[None]:
        def watched(parameters: Any, *args: Any, **kwargs: Any) -> None:
            parameters = list(parameters)
            clip(parameters, *args, **kwargs)
            ids = {id(p) for p in parameters if p.grad is not None}
            grads = [p.grad for p in parameters if p.grad is not None]
            self.clip = dict(
                names=[k for k, p in self.model.named_parameters() if id(p) in ids],
                norm=sum(g.square().sum().item() for g in grads) ** .5,
                largest=max((g.abs().max().item() for g in grads), default=0.),
            )

        clip = timm.utils.dispatch_clip_grad
        with patch('timm.utils.dispatch_clip_grad', watched), patch('timm.utils.cuda.dispatch_clip_grad', watched):
            yield
