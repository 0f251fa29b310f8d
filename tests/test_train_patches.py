import gc
import inspect
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import timm
import timm.task
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform, transforms_factory
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import random_seed
from torchvision.transforms.functional import pil_to_tensor

from timm_awm import train_script


def script(train_one_epoch=None, create=create_optimizer_v2):
    module = ModuleType('__main__')
    module.create_optimizer_v2 = create
    if train_one_epoch is not None:
        module.train_one_epoch = train_one_epoch
    return module


@pytest.fixture
def inside_train_py(monkeypatch):
    """The running script is like train.py; what is replaced in timm is put back afterwards."""
    gc.collect()  # optimizers of earlier tests
    module = script(lambda epoch, result: result)
    monkeypatch.setitem(sys.modules, '__main__', module)
    monkeypatch.setattr(transforms_factory, 'transforms_imagenet_train', transforms_factory.transforms_imagenet_train)
    for task in vars(timm.task).values():
        if 'prepare_distributed' in getattr(task, '__dict__', ()):
            monkeypatch.setattr(task, 'prepare_distributed', task.prepare_distributed)
    train_script.install()
    return module


def picture(size=32):
    torch.manual_seed(0)
    return Image.fromarray(torch.randint(1, 256, (size, size, 3), dtype=torch.uint8).numpy())


def training_transform(**kwargs):
    return create_transform(
        (3, 32, 32), is_training=True, color_jitter=None, mean=(0., 0., 0.), std=(1., 1., 1.), **kwargs)


def test_pad4_crops_the_zero_padded_image_at_random(inside_train_py):
    image = picture()
    padded = torch.nn.functional.pad(pil_to_tensor(image), (4, 4, 4, 4))
    windows = {(y, x): padded[:, y:y + 32, x:x + 32] for y in range(9) for x in range(9)}
    transform = training_transform(train_crop_mode='pad4', hflip=0., use_prefetcher=True)
    crops = (torch.as_tensor(transform(image)) for _ in range(300))
    seen = {next(offset for offset, crop in windows.items() if torch.equal(crop, out)) for out in crops}
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9))
    assert transform(picture(48)).shape == (3, 32, 32)  # resized first
    split = training_transform(train_crop_mode='pad4', separate=True)  # with augmentation splits
    assert isinstance(split, tuple) and split[0](image).size == (32, 32)


def test_pad4_refuses_a_timm_that_crops_in_another_place():
    with_pad4 = train_script._with_pad4(lambda *args, **kwargs: train_script.transforms.Compose([torch.nn.Identity()]))
    with pytest.raises(RuntimeError, match=f'timm {timm.__version__}, Identity.*tested with'):
        with_pad4(32, train_crop_mode='pad4')


@pytest.mark.parametrize('module', [
    script(),
    script(train_one_epoch=lambda model, epoch: None),
    script(train_one_epoch=lambda epoch, model: None, create=print),
    script(train_one_epoch='epoch'),
])
def test_other_scripts_and_timm_in_them_are_left_alone(module, monkeypatch):
    monkeypatch.setitem(sys.modules, '__main__', module)
    before = dict(vars(module))
    train_script.install()
    assert vars(module) == before
    for function in transforms_factory.transforms_imagenet_train, ClassificationTask.prepare_distributed:
        assert inspect.getmodule(function).__name__.startswith('timm.')


def test_train_py_gets_the_epoch_and_the_summary_the_phase(inside_train_py):
    optimizer = create_optimizer_v2(timm.create_model('awm_resnet14_cifar'), opt='alternating', lr=.1, period=2)
    assert inside_train_py.train_one_epoch(3, result=dict(loss=1)) == dict(loss=1, phase='merge')
    assert (optimizer.epoch, optimizer.phase) == (3, 'merge')
    assert inside_train_py.train_one_epoch(4, result=None) is None
    assert optimizer.phase == 'backbone'


def draw(epoch):
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_a_resumed_run_has_random_numbers_of_its_own(inside_train_py, monkeypatch):
    def run(seed, *epochs):
        monkeypatch.setitem(sys.modules, '__main__', script(lambda epoch: draw(epoch)))
        train_script.install()
        random_seed(seed)  # as train.py does
        return [sys.modules['__main__'].train_one_epoch(epoch) for epoch in epochs]

    from_the_start = run(0, 0, 1)
    random_seed(0)
    assert from_the_start == [draw(0), draw(1)]  # nothing is changed
    assert run(0, 10, 11) == run(0, 10, 11)
    runs = [run(seed, first, first + 1) for seed, first in ((0, 0), (0, 9), (0, 10), (1, 0), (1, 9), (1, 10), (2, 8))]
    drawn = [x for epochs in runs for epoch in epochs for x in epoch]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize('period', [0, 1])
def test_ddp_looks_for_unused_parameters_where_phases_alternate(period, inside_train_py):
    model = timm.create_model('awm_resnet14_cifar')
    optimizer = create_optimizer_v2(model, opt='alternating', lr=.1, period=period)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    try:
        task.prepare_distributed()
        assert task.trainable_module.find_unused_parameters == bool(period)
        for epoch in range(3):
            optimizer.set_epoch(epoch)
            for _ in range(2):  # else the second ends in an error
                task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
    finally:
        dist.destroy_process_group()
