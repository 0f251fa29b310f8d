"""A training loop for CI, which has no train.py of timm's: makes train.py's calls to the model, the optimizer, the
scheduler and what stands between them in train.py's order, on random images.
"""
import argparse
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, List, Optional, Tuple

import torch
from timm import utils
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from torch import nn

import timm_awm

BATCHES = 5  # an epoch

# the switches of train.py that the table uses, with their defaults; those from --device-modules on do nothing here
parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
parser.add_argument('--num-classes', type=int)
parser.add_argument('--initial-checkpoint', default='')
parser.add_argument('--resume', default='')
parser.add_argument('--no-resume-opt', action='store_true')
parser.add_argument('--start-epoch', type=int)
parser.add_argument('--epochs', type=int, default=300)
parser.add_argument('--seed', type=int, default=42)
parser.add_argument('-b', '--batch-size', type=int, default=128)
parser.add_argument('--grad-accum-steps', type=int, default=1)
parser.add_argument('--grad-checkpointing', action='store_true')
parser.add_argument('--channels-last', action='store_true')
parser.add_argument('--torchcompile', nargs='?', const='inductor')
parser.add_argument('--amp', action='store_true')
parser.add_argument('--amp-dtype', default='float16')
parser.add_argument('--opt', default='sgd')
parser.add_argument('--opt-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
parser.add_argument('--lr', type=float)
parser.add_argument('--momentum', type=float, default=.9)
parser.add_argument('--weight-decay', type=float, default=2e-5)
parser.add_argument('--clip-grad', type=float)
parser.add_argument('--clip-mode', default='norm')
parser.add_argument('--layer-decay', type=float)
parser.add_argument('--layer-decay-min-scale', type=float, default=0)
parser.add_argument('--layer-decay-no-opt-scale', type=float)
parser.add_argument('--sched', default='cosine')
parser.add_argument('--sched-on-updates', action='store_true')
parser.add_argument('--min-lr', type=float, default=0)
parser.add_argument('--warmup-lr', type=float, default=1e-5)
parser.add_argument('--warmup-epochs', type=int, default=5)
parser.add_argument('--warmup-prefix', action='store_true')
parser.add_argument('--cooldown-epochs', type=int, default=0)
parser.add_argument('--decay-epochs', type=float, default=90)
parser.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270])
parser.add_argument('--decay-rate', type=float, default=.1)
parser.add_argument('--patience-epochs', type=int, default=10)
parser.add_argument('--eval-metric', default='top1')
parser.add_argument('--val-interval', type=int, default=1)
parser.add_argument('--model-ema', action='store_true')
parser.add_argument('--model-ema-force-cpu', action='store_true')
parser.add_argument('--model-ema-decay', type=float, default=.9998)
parser.add_argument('--kd-model-name')
parser.add_argument('--kd-distill-type', default='logit')
parser.add_argument('--kd-temperature', type=float, default=4.)
parser.add_argument('--output', default='')
parser.add_argument('--experiment', default='')
parser.add_argument('--device-modules', nargs='+')
parser.add_argument('--data-dir')
parser.add_argument('--device', default='cuda')
parser.add_argument('--no-prefetcher', action='store_true')
parser.add_argument('-j', '--workers', type=int, default=4)
parser.add_argument('--sync-bn', action='store_true')  # of several processes

Batch = Tuple[torch.Tensor, torch.Tensor]


def main(argv: List[str], train_one_epoch: Optional[Callable] = None) -> None:
    train_one_epoch = train_one_epoch or globals()['train_one_epoch']
    args = parser.parse_args(argv)
    utils.random_seed(args.seed)
    model = create_model(
        args.model, num_classes=args.num_classes, checkpoint_path=args.initial_checkpoint, **args.model_kwargs)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    autocast = partial(torch.autocast, 'cpu', dtype=getattr(torch, args.amp_dtype)) if args.amp else nullcontext

    criterion = nn.CrossEntropyLoss()
    distillation = dict(student_model=model, teacher_model=args.kd_model_name, criterion=criterion)
    if args.kd_model_name is None:
        task = ClassificationTask(model=model, criterion=criterion)
    elif args.kd_distill_type == 'logit':
        task = LogitDistillationTask(temperature=args.kd_temperature, **distillation)
    else:
        task = FeatureDistillationTask(**distillation)
    model = getattr(task, 'trainable_module', model)  # which train.py of timm 1.0.26 does not know

    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    resume_epoch = None
    if args.resume:
        resume_epoch = resume_checkpoint(model, args.resume, optimizer=None if args.no_resume_opt else optimizer)
    model_ema = None
    if args.model_ema:
        device = 'cpu' if args.model_ema_force_cpu else None
        model_ema = utils.ModelEmaV3(model, decay=args.model_ema_decay, device=device)
        if args.resume:
            load_checkpoint(model_ema.module, args.resume, use_ema=True)
    if args.torchcompile:
        task = torch.compile(task, backend=args.torchcompile)

    folder = utils.get_outdir(args.output, args.experiment)
    saver = utils.CheckpointSaver(
        model=model, optimizer=optimizer, args=args, model_ema=model_ema, checkpoint_dir=folder, recovery_dir=folder,
        decreasing=args.eval_metric == 'loss')
    updates_per_epoch = (BATCHES + args.grad_accum_steps - 1) // args.grad_accum_steps
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch)
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if start_epoch and args.sched_on_updates:
        scheduler.step_update(start_epoch * updates_per_epoch)
    elif start_epoch:
        scheduler.step(start_epoch)

    batches = [(torch.randn(args.batch_size, 3, 16, 16), torch.arange(args.batch_size) % args.num_classes)
               for _ in range(BATCHES)]
    for epoch in range(start_epoch, epochs):
        train_one_epoch(
            epoch, model, batches, optimizer, args, task=task, lr_scheduler=scheduler, amp_autocast=autocast,
            loss_scaler=None, model_ema=model_ema)
        if (epoch + 1) % args.val_interval and epoch + 1 != epochs:
            scheduler.step(epoch + 1, metric=None)
            continue
        metrics = validate(model, batches[0])
        if model_ema is not None:
            metrics = validate(model_ema, batches[0])
        saver.save_checkpoint(epoch, metric=metrics[args.eval_metric])
        scheduler.step(epoch + 1, metrics[args.eval_metric])


def train_one_epoch(
        epoch: int,
        model: nn.Module,
        batches: List[Batch],
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        task: nn.Module,
        lr_scheduler: Any,
        amp_autocast: Callable = nullcontext,
        loss_scaler: Optional[utils.NativeScaler] = None,
        model_ema: Optional[utils.ModelEmaV3] = None,
) -> None:
    timm_awm.optim.set_epoch(epoch)  # here, in train.py's stead
    second_order = getattr(optimizer, 'is_second_order', False)
    model.train()
    accum_steps = args.grad_accum_steps
    left_over = len(batches) % accum_steps
    updates = epoch * ((len(batches) + accum_steps - 1) // accum_steps)
    optimizer.zero_grad()
    for i, (images, target) in enumerate(batches):
        need_update = (i + 1) % args.grad_accum_steps == 0 or i + 1 == len(batches)
        if i >= len(batches) - left_over:
            accum_steps = left_over
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with amp_autocast():
            loss = task(images, target)['loss']
        if accum_steps > 1:
            loss = loss / accum_steps
        clip = list(model.parameters())[:-2 if 'agc' in args.clip_mode else None]
        if loss_scaler is not None:
            loss_scaler(
                loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=clip,
                create_graph=second_order, need_update=need_update)
        else:
            loss.backward(create_graph=second_order)
            if need_update and args.clip_grad is not None:
                utils.dispatch_clip_grad(clip, value=args.clip_grad, mode=args.clip_mode)
            if need_update:
                optimizer.step()
        if not need_update:
            continue
        updates += 1
        optimizer.zero_grad()
        if model_ema is not None:
            model_ema.update(model, step=updates)
        lr_scheduler.step_update(num_updates=updates, metric=loss.item())
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()


def validate(model: nn.Module, batch: Batch) -> 'OrderedDict[str, float]':
    model.eval()
    with torch.inference_mode():
        output = model(batch[0])
    output = output[0] if isinstance(output, tuple) else output
    top1 = utils.accuracy(output, batch[1])[0].item()
    return OrderedDict(loss=nn.functional.cross_entropy(output, batch[1]).item(), top1=top1)
