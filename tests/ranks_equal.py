"""A device module for train.py under torchrun: stops it when the processes' parameters differ after an epoch.

Import it after timm_awm, whose clock it wraps.
"""
import functools
import sys

import torch
import torch.distributed as dist

main = sys.modules['__main__']
train_one_epoch = main.train_one_epoch


@functools.wraps(train_one_epoch)
def checked(epoch, model, *args, **kwargs):
    metrics = train_one_epoch(epoch, model, *args, **kwargs)
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others), f'the processes differ after epoch {epoch}'
    print(f'equal after epoch {epoch}', flush=True)
    return metrics


main.train_one_epoch = checked
