"""What test_distributed.py starts in one process and, by torchrun, in two: the same training on the same batches.

Usage: distributed_worker.py RESULT ACCUMULATE CLIP
"""
import sys
import time

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

EPOCHS, UPDATES, GLOBAL_BATCH = 8, 3, 16

result, accumulate, clip = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group('gloo')
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # float32's rounding grows over the updates
# normalisation within each image, so that the size of a local batch does not matter
model = timm.create_model('awm_resnet14_cifar', num_classes=4, norm_layer='groupnorm1')
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
optimizer = create_optimizer_v2(
    model, opt='alternating', base='sgd', period=1, lr=.05, momentum=.9, weight_decay=1e-3)
if ranks > 1:
    task.prepare_distributed(find_unused_parameters=True)
    ddp = next(m for m in task.modules() if isinstance(m, DistributedDataParallel))
data = torch.Generator().manual_seed(0)
flops = {}
for epoch in range(EPOCHS):
    optimizer.set_epoch(epoch)
    for _ in range(UPDATES):
        images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=data).chunk(ranks * accumulate)[rank::ranks]
        labels = torch.randint(4, (GLOBAL_BATCH,), generator=data).chunk(ranks * accumulate)[rank::ranks]
        with FlopCounterMode(display=False) as counter:
            for i, (x, y) in enumerate(zip(images, labels)):
                if ranks > 1 and i < accumulate - 1:
                    with ddp.no_sync():
                        (task(x, y)['loss'] / accumulate).backward()
                else:
                    (task(x, y)['loss'] / accumulate).backward()
        flops[optimizer.phase] = counter.get_total_flops()
        if clip != 'none':
            timm.utils.dispatch_clip_grad(model_parameters(model, exclude_head=clip == 'agc'), value=.01, mode=clip)
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others), f'the ranks differ after epoch {epoch}'
if rank == 0:
    torch.save(dict(parameters=dict(model.named_parameters()), flops=flops), result)
dist.destroy_process_group()
# a thread of gloo may still hold the last gradient's work, and aborts if Python ends first (any DDP model, torch 2.14)
time.sleep(1)
