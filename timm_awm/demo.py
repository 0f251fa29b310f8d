"""An AWM model from training to a look inside, in a minute or two. Offline, on a CPU."""
from pathlib import Path
from typing import Tuple

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed, update_summary
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from .analysis import collect_mixing_weights, plot_profiles
from .hub import save_for_hub
from .utils import new_folder

MODEL = 'awm_resnet14_cifar'
MEAN, STD = 0.305, 0.376  # of all pixels


def run(output: Path, epochs: int = 12, period: int = 2) -> None:
    """Train MODEL on scikit-learn's digits with alternating phases, leaving model and figure in a new folder."""
    with new_folder(output) as partial:
        _run(partial, epochs, period)
    print(f'Everything is in {output}: hub/ (the model), summary.csv, lambda-profile.png')


def _run(output: Path, epochs: int, period: int) -> None:
    random_seed(0)
    model = timm.create_model(MODEL, pretrained_cfg_overlay=dict(
        input_size=(1, 32, 32), mean=(MEAN,), std=(STD,), num_classes=10, tag='digits'))
    train, test = _loaders()
    optimizer = create_optimizer_v2(
        model, opt='alternating', base='sgd', period=period, lr=0.05, weight_decay=1e-4, filter_bias_and_bn=False)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs)
    print(f'{MODEL}: {len(train.dataset)} training and {len(test.dataset)} held-out digits, {epochs} epochs')  # type: ignore[arg-type]
    for epoch in range(epochs):
        optimizer.set_epoch(epoch)
        model.train()
        losses = AverageMeter()
        description = f'Epoch {epoch + 1:>2}/{epochs}, {optimizer.phase:>8} phase'
        for images, labels in tqdm(train, desc=description, unit='batch', mininterval=0.5):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(images))
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(images) for images, _ in test])
        top1 = accuracy(logits, torch.cat([labels for _, labels in test]))[0].item()
        update_summary(
            epoch, dict(loss=losses.avg, phase=optimizer.phase), dict(top1=top1), output / 'summary.csv',
            lr=optimizer.param_groups[0]['lr'], write_header=epoch == 0)
        scheduler.step(epoch + 1)
    print(f'Held-out accuracy after the last epoch: {top1:.1f} %')

    save_for_hub(model, output / 'hub')
    reloaded = timm.create_model(f'local-dir:{output / "hub"}', pretrained=True)
    print("Saved in the Hub's format, loaded back with timm.create_model('local-dir:...')")
    lambdas = collect_mixing_weights(reloaded, (images for images, _ in test))
    plot_profiles({f'{MODEL} on held-out digits': lambdas}).savefig(output / 'lambda-profile.png', dpi=120)


def _loaders() -> Tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = (torch.tensor(digits.images[:, None], dtype=torch.float32) / 16 - MEAN) / STD
    data = TensorDataset(F.interpolate(images, size=32, mode='bilinear'), torch.tensor(digits.target))
    train, test = train_test_split(range(len(data)), test_size=360, random_state=0, stratify=digits.target)
    return DataLoader(Subset(data, train), batch_size=64, shuffle=True), DataLoader(Subset(data, test), batch_size=64)
