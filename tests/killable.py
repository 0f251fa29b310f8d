"""A device module for train.py that makes it worth killing: data in an order that the epoch alone decides, so that a
resumed run can be compared with an uninterrupted one, and saving slow enough for a random kill to meet it half-done.

Import it after timm_awm, whose clock it wraps.
"""
import functools
import io
import sys
import time

import torch

main = sys.modules['__main__']
train_one_epoch, save = main.train_one_epoch, torch.save


@functools.wraps(train_one_epoch)
def in_its_own_order(epoch, model, loader, *args, **kwargs):
    loader.sampler.generator = torch.Generator().manual_seed(epoch)
    return train_one_epoch(epoch, model, loader, *args, **kwargs)


def slow_save(state, path):
    buffer = io.BytesIO()
    save(state, buffer)
    data = buffer.getvalue()
    with open(path, 'wb') as file:
        for start in range(0, len(data), 1 + len(data) // 4):
            file.write(data[start:start + 1 + len(data) // 4])
            file.flush()
            time.sleep(.05)


main.train_one_epoch = in_its_own_order
torch.save = slow_save
