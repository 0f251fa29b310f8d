"""Two processes on one machine, by torchrun: each trains alone on all images, then both share them under DDP."""
import os
import subprocess
import sys
import time

import pytest
import timm
import timm.utils
import torch
import torch.distributed as dist
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import timm_awm  # noqa: F401

EPOCHS, UPDATES, GLOBAL_BATCH = 4, 3, 16


def train(accumulate, clip, rank=0, ranks=1):
    """The trained parameters, and the FLOPs of an update in each phase."""
    torch.manual_seed(0)
    # normalisation within each image, so that the size of a local batch does not matter
    model = timm.create_model('awm_resnet14_cifar', num_classes=4, norm_layer='groupnorm1')
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(
        model, opt='alternating', base='sgd', period=1, lr=.05, momentum=.9, weight_decay=1e-3)
    if ranks > 1:
        task.prepare_distributed(find_unused_parameters=True)
    ddp = next((m for m in task.modules() if isinstance(m, DistributedDataParallel)), None)
    assert (ddp is None) == (ranks == 1)
    data = torch.Generator().manual_seed(0)
    flops = {}
    for epoch in range(EPOCHS):
        optimizer.set_epoch(epoch)
        for _ in range(UPDATES):
            images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=data).chunk(ranks * accumulate)[rank::ranks]
            labels = torch.randint(4, (GLOBAL_BATCH,), generator=data).chunk(ranks * accumulate)[rank::ranks]
            with FlopCounterMode(display=False) as counter:
                for i, (x, y) in enumerate(zip(images, labels)):
                    if ddp is not None:
                        ddp.require_backward_grad_sync = i == accumulate - 1  # as no_sync sets it
                    (task(x, y)['loss'] / accumulate).backward()
            flops[optimizer.phase] = counter.get_total_flops()
            if clip:
                parameters = model_parameters(model, exclude_head=clip == 'agc')
                timm.utils.dispatch_clip_grad(parameters, value=.01, mode=clip)
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), flops


@pytest.mark.slow
def test_two_processes_train_like_one_and_stay_equal():
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__]
    result = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('equal') == 4


if __name__ == '__main__':
    dist.init_process_group('gloo')
    torch.set_default_dtype(torch.float64)  # float32's rounding grows over the updates
    for accumulate, clip in ((1, None), (2, 'norm'), (2, 'value'), (1, 'agc')):
        one, flops = train(accumulate, clip)
        two, shared_flops = train(accumulate, clip, dist.get_rank(), dist.get_world_size())
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
        others = [torch.empty_like(two) for _ in range(dist.get_world_size())]
        dist.all_gather(others, two)
        assert all(torch.equal(two, other) for other in others)
        # what is frozen costs nothing in two processes either
        assert shared_flops == {phase: n / 2 for phase, n in flops.items()}
        assert flops['merge'] < .7 * flops['backbone']
        if dist.get_rank() == 0:
            print('equal', accumulate, clip, flush=True)
    dist.destroy_process_group()
    # a thread of gloo may still hold the last gradient's work, and aborts if Python ends first (any DDP model, torch
    # 2.14)
    time.sleep(1)
