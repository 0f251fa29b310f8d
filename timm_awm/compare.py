"""Time and memory of models against their plain and SE controls, side by side in one process.

Every round runs every contender once, in shuffled order, so that noise of the machine hits all alike. A ratio is the
median over the rounds of base time / own time: above 1 is faster than the base.

Peak memory is the contender's own parameters, buffers, optimizer state and batch, and the most that one step allocates
on top.
"""
import csv
import gc
import math
import os
import platform
import random
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import ResNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from . import __version__
from .layers import MixingWeights
from .optim.schedule import BACKBONE, MERGE
from .utils import find_device

__all__ = ['Settings', 'run']

SEED = 0

COLUMNS = (
    'model', 'phase',
    # timm's own
    'infer_samples_per_sec', 'infer_step_time', 'infer_batch_size', 'infer_img_size', 'infer_gmacs',
    'train_samples_per_sec', 'train_step_time', 'train_batch_size', 'train_img_size', 'param_count',
    # ours: IQR of the step time in ms; ratios to the base
    'step_time_iqr', 'base', 'ratio', 'ratio_iqr', 'peak_mib', 'peak_ratio', 'rounds',
    'amp', 'compile', 'channels_last', 'device', 'torch', 'timm',
)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""
    modes: Sequence[str] = ('train', 'infer')
    batch_size: Optional[int] = None  # None: by image size and mode
    img_size: Optional[int] = None  # px; None: the base's own
    amp_dtype: Optional[str] = None  # 'bfloat16' or 'float16'; None: float32 without autocast
    compile: bool = False
    channels_last: bool = True
    device: Optional[str] = None  # None: an accelerator if there is one
    warmup: int = 3  # steps of each contender
    repeats: int = 20  # rounds
    csv: Optional[Path] = None  # new file


@dataclass(frozen=True)
class Spec:
    """A model by its name in timm's registry and its arguments."""
    name: str
    kwargs: Dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kwargs = {**self.kwargs, **self.kwargs.get('block_args', {})}
        kwargs.pop('block_args', None)
        return ' '.join([self.name, *(f'{k}={v}' for k, v in kwargs.items())])

    def create(self, **kwargs: Any) -> nn.Module:
        return timm.create_model(self.name, **self.kwargs, **kwargs)


@dataclass
class Contender:
    """Inference of a model, or its training step in one phase, ready to be timed."""
    label: str
    phase: str
    model: nn.Module
    step: Callable[[], None]
    optimizer: Any = None  # of timm; None in inference
    prepare: Callable[[], Any] = lambda: None  # before each step, not timed
    peak: float = 0.  # bytes; NaN where the device does not say
    seconds: List[float] = field(default_factory=list)  # by round

    def kept_bytes(self, *batch: Tensor) -> int:
        """What is there between two steps."""
        state = list(self.optimizer.state.values()) if self.optimizer else []
        kept = [*batch, *self.model.parameters(), *self.model.buffers(), *tree_leaves(state)]
        return sum(t.nbytes for t in kept if isinstance(t, Tensor))


def run(models: Sequence[str], settings: Settings) -> None:
    """Measure and print. An `awm_*` model brings its controls along; models named after it run with it.

    If the run is interrupted, what has been measured is still printed and written.

    Raises:
        ValueError: A model is unknown, or the device cannot be used.
        FileExistsError: The CSV file exists.
    """
    groups = group_contenders(models)
    device = find_device(settings.device)
    if settings.csv is not None and settings.csv.exists():
        raise FileExistsError(f'{settings.csv} exists already: choose another file.')
    torch.backends.cudnn.benchmark = True  # as timm's scripts have it
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # the profiler's own messages
    print(_header(settings, device), flush=True)
    for group in groups:
        for mode in settings.modes:
            _compare(group, mode, settings, device)


def group_contenders(models: Sequence[str]) -> List[List[Spec]]:
    """Contenders that run together, the base of each group first."""
    groups: List[List[Spec]] = []
    for name in models:
        if not timm.is_model(name):
            raise ValueError(f'Unknown model {name!r}: timm.list_models() lists them all.')
        if name.startswith('awm_'):
            groups.append(with_controls(name))
        elif not groups:
            groups.append([Spec(name)])
        elif Spec(name) not in groups[-1]:
            groups[-1].append(Spec(name))
    return groups


def with_controls(name: str) -> List[Spec]:
    """timm's own plain model, if there is one; the plain control, if that is another network; the AWM model itself; an
    SE model, if there can be one."""
    awm, control = Spec(name), Spec(name, dict(awm=False))
    own = name.partition('.')[0].removeprefix('awm_')
    with torch.device('meta'):
        control_model = control.create()
        plain = [control]
        if timm.is_model(own):
            same = repr(Spec(own).create()) == repr(control_model)  # the same modules: the same network
            plain = [Spec(own)] if same else [Spec(own), control]
    se = []
    if timm.is_model(f'se{own}'):
        se = [Spec(f'se{own}')]
    elif isinstance(control_model, ResNet):
        se = [Spec(name, dict(awm=False, block_args=dict(attn_layer='se')))]
    return [*plain, awm, *se]


def _compare(specs: List[Spec], mode: str, settings: Settings, device: torch.device) -> None:
    gc.collect()  # models of an earlier call
    torch.compiler.reset()
    torch.manual_seed(SEED)
    with torch.device('meta'):
        base = specs[0].create()
    channels, _, size = resolve_model_data_config(base)['input_size']
    size = settings.img_size or size
    batch = settings.batch_size or (128 if size <= 64 else 16 if mode == 'train' else 8)
    x = torch.randn(batch, channels, size, size, device=device)
    y = torch.randint(base.num_classes, (batch,), device=device)
    if settings.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    contenders: List[Contender] = []
    for spec in specs:
        for contender in make_contenders(spec, mode, settings, x, y, base.num_classes):
            contender.prepare()
            for _ in range(settings.warmup):
                contender.step()
            contender.peak = peak_memory(contender.step, device) + contender.kept_bytes(x, y)
            contenders.append(contender)

    order = random.Random(SEED)
    try:
        for _ in tqdm(range(settings.repeats), desc=f'{specs[0]}, {mode}', unit='round'):
            for contender in order.sample(contenders, len(contenders)):
                contender.seconds.append(_seconds(contender, device))
    finally:
        if all(contender.seconds for contender in contenders):
            rows = [_row(contender, contenders[0], mode, x, settings) for contender in contenders]
            print(f'\n{_table(rows, mode)}', flush=True)
            if settings.csv is not None:
                with settings.csv.open('a', newline='', encoding='utf-8') as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if not file.tell():
                        writer.writeheader()
                    writer.writerows(rows)


def make_contenders(
        spec: Spec, mode: str, settings: Settings, x: Tensor, y: Tensor, num_classes: int) -> List[Contender]:
    """One contender, or the two phases of the training of a model with merges, which share the model."""
    model = spec.create(num_classes=num_classes).to(x.device).train(mode == 'train')
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

    if mode == 'infer':
        return [Contender(str(spec), '', model, infer)]
    has_merges = any(isinstance(m, MixingWeights) for m in model.modules())
    kwargs: Dict[str, Any] = dict(opt='alternating', base='sgd', period=1) if has_merges else dict(opt='sgd')
    optimizer = create_optimizer_v2(model, **kwargs, lr=.01, momentum=.9, weight_decay=1e-4)
    if not has_merges:
        return [Contender(str(spec), '', model, train, optimizer)]
    return [
        Contender(str(spec), phase, model, train, optimizer, partial(optimizer.set_epoch, epoch))
        for epoch, phase in enumerate((BACKBONE, MERGE))]


def peak_memory(step: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call allocates for tensors, at most at once, beyond what is there before it; NaN if not known.

    On a CPU from the profiler's events of torch's allocator, which does not see buffers inside oneDNN; elsewhere from
    the device's allocator.
    """
    if device.type == 'cpu':
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
        return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))
    memory = torch.get_device_module(device)
    if not hasattr(memory, 'reset_peak_memory_stats'):
        return math.nan  # MPS
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    step()
    return memory.max_memory_allocated(device) - before


def _seconds(contender: Contender, device: torch.device) -> float:
    synchronize = (lambda: None) if device.type == 'cpu' else partial(torch.accelerator.synchronize, device)
    contender.prepare()
    synchronize()
    start = time.perf_counter()
    contender.step()
    synchronize()
    return time.perf_counter() - start


def _row(contender: Contender, base: Contender, mode: str, x: Tensor, settings: Settings) -> Dict[str, Any]:
    """A contender's results, by `COLUMNS`."""
    batch, size = x.shape[0], x.shape[-1]
    low, median, high = np.percentile(1e3 * np.array(contender.seconds), (25, 50, 75))
    ratios = [of_base / own for of_base, own in zip(base.seconds, contender.seconds)]
    ratio_low, ratio, ratio_high = np.percentile(ratios, (25, 50, 75))
    row = {
        'model': contender.label,
        'phase': contender.phase,
        f'{mode}_samples_per_sec': round(1e3 * batch / median, 2),
        f'{mode}_step_time': round(median, 3),
        f'{mode}_batch_size': batch,
        f'{mode}_img_size': size,
        'param_count': round(sum(p.numel() for p in contender.model.parameters()) / 1e6, 2),
        'step_time_iqr': round(high - low, 3),
        'base': base.label,
        'ratio': round(ratio, 4),
        'ratio_iqr': round(ratio_high - ratio_low, 4),
        'peak_mib': round(contender.peak / 2 ** 20, 1),
        'peak_ratio': round(contender.peak / base.peak, 4),
        'rounds': len(contender.seconds),
        'amp': settings.amp_dtype,
        'compile': settings.compile,
        'channels_last': settings.channels_last,
        'device': _device_name(x.device),
        'torch': torch.__version__,
        'timm': timm.__version__,
    }
    if mode == 'infer':
        with torch.inference_mode(), FlopCounterMode(display=False) as flops:
            contender.model(x)
        row['infer_gmacs'] = round(flops.get_total_flops() / 2e9 / batch, 2)
    return row


def _table(rows: List[Dict[str, Any]], mode: str) -> str:
    first = rows[0]
    lines = [
        f"{'Training step' if mode == 'train' else 'Inference'}, batch {first[f'{mode}_batch_size']}, "
        f"{first[f'{mode}_img_size']} px, {first['rounds']} rounds, ratios to {first['base']}:",
        '',
        '| model | phase | ms | IQR | images/s | ratio | IQR | peak MiB | peak ratio |',
        '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['phase']} | {row[f'{mode}_step_time']:.1f} | {row['step_time_iqr']:.1f} | "
            f"{row[f'{mode}_samples_per_sec']:.1f} | {row['ratio']:.3f} | {row['ratio_iqr']:.3f} | "
            f"{row['peak_mib']:.1f} | {row['peak_ratio']:.2f} |")
    return '\n'.join(lines)


def _header(settings: Settings, device: torch.device) -> str:
    kept = 'LD_PRELOAD', 'MALLOC_', 'OMP_NUM_THREADS', 'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'TIMM_AWM_'
    environment = [f'{k}={v}' for k, v in sorted(os.environ.items()) if k.startswith(kept)]
    return f'''command: {shlex.join(sys.argv)}
versions: timm_awm {__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {platform.python_version()}
device: {_device_name(device)}; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads
environment: {' '.join(environment) or 'nothing that matters is set'}
settings: {settings}; SGD with momentum and weight decay (alternating in AWM models); seed {SEED}
ms and ratio are medians, IQR their interquartile range; ratio: base / own time of the same round, above 1 is faster
peak: own parameters, buffers, optimizer state and batch, and the most that a step allocates for tensors'''


def _device_name(device: torch.device) -> str:
    if device.type != 'cpu':
        get_name = getattr(torch.get_device_module(device), 'get_device_name', lambda device: device.type)
        return get_name(device)
    info = Path('/proc/cpuinfo')
    names = re.findall(r'^model name\s*: (.*)', info.read_text(encoding='utf-8'), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
