import sys
from types import ModuleType

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.optim import create_optimizer_v2, list_optimizers
from torchvision.transforms.functional import pil_to_tensor

from timm_awm import patches


def picture(size=32):
    torch.manual_seed(0)
    return Image.fromarray(torch.randint(1, 256, (size, size, 3), dtype=torch.uint8).numpy())


def training_transform(**kwargs):
    return create_transform(
        (3, 32, 32), is_training=True, color_jitter=None, mean=(0., 0., 0.), std=(1., 1., 1.), **kwargs)


def windows(image):
    """All 81 crops of the image with four black pixels around it."""
    padded = torch.nn.functional.pad(pil_to_tensor(image), (4, 4, 4, 4))
    return {(y, x): padded[:, y:y + 32, x:x + 32] for y in range(9) for x in range(9)}


@pytest.mark.parametrize('separate', [False, True])
@pytest.mark.parametrize('prefetcher', [False, True])
def test_pad4_crops_the_zero_padded_image_at_random(separate, prefetcher):
    image = picture()
    transform = training_transform(
        train_crop_mode='pad4', hflip=0., separate=separate, use_prefetcher=prefetcher)
    if separate:
        def run(x):
            for part in transform:
                x = part(x)
            return x
    else:
        run = transform
    crops = windows(image)
    torch.manual_seed(1)
    seen = set()
    for _ in range(300):
        out = torch.as_tensor(run(image))
        out = out if prefetcher else (out * 255).round().byte()
        seen.add(next(offset for offset, crop in crops.items() if torch.equal(crop, out)))
    assert len(seen) > 60  # 81 in the long run
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9))


def test_pad4_flips_and_resizes():
    image = picture()
    flipped = {offset: crop.flip(2) for offset, crop in windows(image).items()}
    transform = training_transform(train_crop_mode='pad4', hflip=1., use_prefetcher=True)
    assert any(torch.equal(crop, torch.as_tensor(transform(image))) for crop in flipped.values())
    assert transform(picture(48)).shape == (3, 32, 32)


def test_other_crop_modes_are_timms():
    for mode in ('rrc', 'rkrc', 'rkrr', None):
        names = [type(t).__name__ for t in training_transform(train_crop_mode=mode).transforms]
        original = patches.transforms_factory.transforms_imagenet_train.__wrapped__(
            32, train_crop_mode=mode, color_jitter=None)
        assert names == [type(t).__name__ for t in original.transforms]


def test_pad4_refuses_a_timm_that_crops_in_another_place():
    with_pad4 = patches._with_pad4(lambda *args, **kwargs: patches.transforms.Compose([torch.nn.Identity()]))
    with pytest.raises(RuntimeError, match=f'timm {timm.__version__}, Identity.*tested with'):
        with_pad4(32, train_crop_mode='pad4')


def test_the_optimizer_is_in_timms_registry():
    assert 'alternating' in list_optimizers()
    model = timm.create_model('awm_resnet14_cifar')
    optimizer = create_optimizer_v2(
        model, opt='alternating', lr=.1, momentum=.8, weight_decay=1e-4, base='sgd', period=2, filter_bias_and_bn=False)
    for group in optimizer.param_groups:
        assert (group['lr'], group['momentum'], group['weight_decay'], group['nesterov']) == (.1, .8, 1e-4, True)


def script(train_one_epoch=None, create=create_optimizer_v2):
    module = ModuleType('__main__')
    module.create_optimizer_v2 = create
    module.create_dataset = timm.data.create_dataset.__wrapped__
    if train_one_epoch is not None:
        module.train_one_epoch = train_one_epoch
    return module


@pytest.mark.parametrize('module', [
    script(),
    script(train_one_epoch=lambda model, epoch: None),
    script(train_one_epoch=lambda epoch, model: None, create=print),
    script(train_one_epoch='epoch'),
])
def test_other_scripts_are_left_alone(module, monkeypatch):
    monkeypatch.setitem(sys.modules, '__main__', module)
    before = dict(vars(module))
    patches.hook_train_script()
    assert vars(module) == before


def test_train_py_gets_the_clock_and_the_folder_check(monkeypatch):
    module = script(train_one_epoch=lambda epoch, loader, lr: dict(epoch=epoch, loader=loader, lr=lr))
    monkeypatch.setitem(sys.modules, '__main__', module)
    patches.hook_train_script()
    optimizer = create_optimizer_v2(timm.create_model('awm_resnet14_cifar'), opt='alternating', lr=.1, period=2)
    assert module.train_one_epoch(3, 'loader', lr=1) == dict(epoch=3, loader='loader', lr=1, phase='merge')
    assert (optimizer.epoch, optimizer.phase) == (3, 'merge')
    with pytest.raises(FileNotFoundError, match='data folder'):
        module.create_dataset('', root='/no/such', split='train')


@pytest.mark.parametrize('name, root', [
    ('', '/no/such'), ('', None), ('hfds//no/such', None), ('hfds/./no-such', None), ('hfds/no/such/cifar10', None),
    ('hfds/uoft-cs/cifar10', '/no/such')])
def test_missing_data_folder(name, root):
    with pytest.raises(FileNotFoundError, match='(?s)data folder .* does not exist. Give.*--data-dir.*--dataset hfds'):
        timm.data.create_dataset(name, root=root, split='train')


def test_class_folders_in_place_of_a_data_set_of_the_hub(tmp_path):
    for split, size in (('train', 3), ('val', 2)):
        for label in ('cat', 'dog'):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(size):
                picture().save(tmp_path / split / label / f'{i}.png')

    def size(split):
        keys = dict(input_key='img', target_key='label')
        return len(timm.data.create_dataset('hfds/uoft-cs/cifar10', str(tmp_path), split, **keys))

    assert (size('train'), size('test'), size('validation'), size('val')) == (6, 4, 4, 4)
    (tmp_path / 'val').rename(tmp_path / 'elsewhere')
    for split in ('train[:5]', 'test[5:]'):
        with pytest.raises(ValueError, match='cannot be sliced.*Parquet'):
            size(split)
    with pytest.raises(FileNotFoundError, match="has no folder 'test' of images.*--val-split"):
        size('test')


def test_parquet_files_in_place_of_a_data_set_of_the_hub(tmp_path, monkeypatch):
    check = patches._with_local_data(lambda name, root, split, **kwargs: (name, root, split))
    (tmp_path / 'plain_text' / 'train').mkdir(parents=True)
    cached = 'hfds/uoft-cs/cifar10', str(tmp_path), 'train'
    assert check(*cached) == cached
    (tmp_path / 'plain_text' / 'train' / '0.parquet').touch()
    monkeypatch.chdir(tmp_path)
    assert check('hfds/uoft-cs/cifar10', '.', 'train') == (f'hfds/{tmp_path}', None, 'train')


def test_other_data_sets_pass_the_folder_check(tmp_path):
    def create_dataset(name, root=None, split='validation', **kwargs):
        return name, dict(kwargs, root=root, split=split)

    check = patches._with_local_data(create_dataset)
    for name, root in (('hfds/uoft-cs/cifar10', None), ('torch/cifar10', '/to/be/made'), (f'hfds/{tmp_path}', None)):
        assert check(name, root=root, split='train') == (name, dict(root=root, split='train'))
    for args, kwargs in ((('', str(tmp_path), 'train'), {}), ((), dict(name='', root=str(tmp_path), split='train'))):
        assert check(*args, **kwargs) == ('', dict(root=str(tmp_path), split='train'))
