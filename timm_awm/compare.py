"""Time of models against their plain and SE controls, side by side in one process.

Every round runs every contender once, in shuffled order, so that noise of the machine hits all alike.
"""
import csv
import difflib
import gc
import os
import platform
import random
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from torch import Tensor
from tqdm import tqdm

from . import __version__
from .utils import find_device

SEED = 0
WARMUP = 3  # steps of each contender that are not timed
PHASES = {'joint': (0, 0), 'backbone': (1, 0), 'merge': (1, 1)}  # the period, and an epoch of the phase
Models = Dict[str, Callable[..., Any]]  # functions that create them, by label; the base first


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison."""
    modes: Sequence[str] = ('train', 'infer')
    batch_sizes: Sequence[int] = ()  # none: one by image size and mode
    img_size: Optional[int] = None  # px; None: the base's own
    amp_dtype: Optional[str] = None  # 'bfloat16' or 'float16'; None: float32 without autocast
    compile: bool = False
    channels_last: bool = True
    device: Optional[str] = None  # None: an accelerator if there is one
    repeats: int = 20  # rounds
    csv: Optional[Path] = None  # new file


@dataclass
class Contender:
    """Inference of a model, or its training step in one phase, ready to be timed."""
    label: str
    phase: str
    step: Callable[[], None]
    peak_mib: Optional[float] = None  # for model, optimizer and step, without the batch; None if not known
    seconds: List[float] = field(default_factory=list)  # by round


def run(models: Sequence[str], settings: Settings) -> None:
    """Measure and print. An `awm_*` model brings its controls along; models named after it run with it.

    Raises:
        ValueError: A model is unknown, or the device cannot be used.
        OSError: The CSV file exists, or cannot be written.
    """
    groups = group_models(models)
    device = find_device(settings.device)
    if settings.csv:
        settings.csv.parent.mkdir(parents=True, exist_ok=True)
        settings.csv.touch(exist_ok=False)
    torch.backends.cudnn.benchmark = True  # timm's scripts have it
    print(_header(device), flush=True)
    rows: List[Dict[str, Any]] = []
    try:
        for group in groups:
            for mode in settings.modes:
                for batch_size in settings.batch_sizes or (None,):
                    rows += _compare(group, mode, batch_size, settings, device)
    finally:  # an error or an interruption loses only the rows of its group
        if settings.csv and rows:
            with settings.csv.open('w', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        elif settings.csv:
            settings.csv.unlink()


def group_models(names: Sequence[str]) -> List[Models]:
    """Models that run together."""
    groups: List[Models] = []
    for name in names:
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=1)
            raise ValueError(f'Unknown model {name!r}' + ''.join(f': the nearest is {other!r}.' for other in near))
        if name.startswith('awm_'):
            groups.append(with_controls(name))
        else:
            groups = groups or [{}]
            groups[-1].setdefault(name, partial(create_model, name))
    return groups


def with_controls(name: str) -> Models:
    """timm's own plain model, or else the plain control; the AWM model itself; an SE model, if there can be one."""
    own = name.partition('.')[0].removeprefix('awm_')
    control = partial(create_model, name, awm=False)
    models: Models = {own: partial(create_model, own)} if timm.is_model(own) else {f'{name} awm=False': control}
    models[name] = partial(create_model, name)
    if timm.is_model(f'se{own}'):
        models[f'se{own}'] = partial(create_model, f'se{own}')
    elif 'densenet' not in name:
        models[f'{name} awm=False attn_layer=se'] = partial(control, block_args=dict(attn_layer='se'))
    return models


def _compare(
        models: Models, mode: str, batch_size: Optional[int], settings: Settings, device: torch.device,
) -> List[Dict[str, Any]]:
    """Rows of the table, which is printed too."""
    gc.collect()  # models of an earlier call
    torch.compiler.reset()
    torch.manual_seed(SEED)
    label = next(iter(models))
    with torch.device('meta'):
        base = models[label]()
    channels, _, size = resolve_model_data_config(base)['input_size']
    size = settings.img_size or size
    batch_size = batch_size or (128 if size <= 64 else 16 if mode == 'train' else 8)
    x = torch.randn(batch_size, channels, size, size, device=device)
    y = torch.randint(base.num_classes, (batch_size,), device=device)
    if settings.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    contenders = [
        make_contender(name, phase, partial(create, num_classes=base.num_classes), mode, settings, x, y)
        for name, create in models.items()
        for phase in (PHASES if mode == 'train' and name.startswith('awm_') and 'awm=False' not in name else [''])]
    order = random.Random(SEED)
    synchronize = torch.cpu.synchronize if device.type == 'cpu' else partial(torch.accelerator.synchronize, device)
    for _ in tqdm(range(settings.repeats), desc=f'{label}, {mode}, batch {batch_size}', unit='round'):
        for contender in order.sample(contenders, len(contenders)):
            synchronize()
            start = time.perf_counter()
            contender.step()
            synchronize()
            contender.seconds.append(time.perf_counter() - start)
    rows = [_row(contender, contenders[0], mode, batch_size, size) for contender in contenders]
    print('\n{mode}, batch {batch_size}, {img_size} px, {rounds} rounds, ratios to {base}:\n'.format_map(rows[0]))
    print('| model | phase | ms | images/s | ratio | IQR | peak MiB |')
    print('| --- | --- | ---: | ---: | ---: | ---: | ---: |')
    for row in rows:
        print('| {model} | {phase} | {step_time:.1f} | {samples_per_sec:.1f} | {ratio:.3f} | {ratio_iqr:.3f} | '
              '{peak} |'.format(**row, peak=row['peak_mib'] or ''), flush=True)
    return rows


def make_contender(
        label: str, phase: str, create: Callable[[], Any], mode: str, settings: Settings, x: Tensor, y: Tensor,
) -> Contender:
    """A contender, warmed up, its peak memory measured."""
    memory = torch.get_device_module(x.device)
    tells_peak = hasattr(memory, 'max_memory_allocated')  # not that of a CPU
    before = memory.memory_allocated(x.device) if tells_peak else 0
    model = create().to(x.device).train(mode == 'train')
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    # a graph break or a fall-back to eager is an error here, not a slow number
    forward = torch.compile(model, fullgraph=True, dynamic=False) if settings.compile else model
    amp_dtype = getattr(torch, settings.amp_dtype) if settings.amp_dtype else None

    @torch.autocast(x.device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    def logits() -> Tensor:
        return forward(x)

    def infer() -> None:
        with torch.inference_mode():
            logits()

    def train() -> None:
        F.cross_entropy(logits().float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    period, epoch = PHASES.get(phase, (0, 0))
    kwargs: Dict[str, Any] = dict(opt='alternating', base='sgd', period=period) if phase else dict(opt='sgd')
    optimizer: Any = create_optimizer_v2(model, **kwargs, lr=.01, momentum=.9, weight_decay=1e-4)
    if phase:
        optimizer.set_epoch(epoch)
    contender = Contender(label, phase, train if mode == 'train' else infer)
    for _ in range(WARMUP):
        contender.step()
    if tells_peak:
        memory.reset_peak_memory_stats(x.device)
        contender.step()
        contender.peak_mib = round((memory.max_memory_allocated(x.device) - before) / 2 ** 20, 1)
    return contender


def _row(contender: Contender, base: Contender, mode: str, batch_size: int, img_size: int) -> Dict[str, Any]:
    seconds = float(np.median(contender.seconds))
    low, ratio, high = np.percentile(np.array(base.seconds) / contender.seconds, (25, 50, 75))
    return dict(
        model=contender.label, phase=contender.phase, mode=mode, batch_size=batch_size, img_size=img_size,
        step_time=round(1e3 * seconds, 3), samples_per_sec=round(batch_size / seconds, 2), base=base.label,
        ratio=round(ratio, 4), ratio_iqr=round(high - low, 4), peak_mib=contender.peak_mib,
        rounds=len(contender.seconds))


def _header(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    kept = 'LD_PRELOAD', 'MALLOC_', 'OMP_', 'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'TIMM_AWM_'
    environment = [f'{k}={v}' for k, v in sorted(os.environ.items()) if k.startswith(kept)]
    return f'''command: timm-awm {shlex.join(sys.argv[1:])}
versions: timm_awm {__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {platform.python_version()}
device: {name}; CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads
environment: {' '.join(environment) or 'nothing that matters is set'}
training: SGD with momentum and weight decay
ms and ratio are medians; ratio: base / own time of the same round, above 1 is faster; IQR: its interquartile range'''
