"""A device module of the tests: unmodified train.py cannot run DDP on a CPU, which takes no `device_ids`. Loaders must
not fork there, for a thread of gloo may hold a lock of Python's just then."""
import functools

import timm.task
import torch.multiprocessing


def _without_device_ids(prepare_distributed):
    @functools.wraps(prepare_distributed)
    def without_device_ids(self, device_ids=None, **kwargs):
        return prepare_distributed(self, device_ids=None, **kwargs)

    return without_device_ids


torch.multiprocessing.set_start_method('forkserver', force=True)
for _task in list(vars(timm.task).values()):
    if 'prepare_distributed' in getattr(_task, '__dict__', ()):
        _task.prepare_distributed = _without_device_ids(_task.prepare_distributed)
