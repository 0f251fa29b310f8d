"""What the merges of a network do with images: their mixing weights, and the accuracy with them held constant."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..layers import MixingWeights, record_mixing_weights

__all__ = ['Observed', 'Ablation', 'observe', 'collect_mixing_weights', 'identity_merges', 'ablate']

Batches = Iterable[Tuple[Tensor, Tensor]]


class Observed(NamedTuple):
    """What `observe` saw, all on the CPU, in the order of the images."""
    lambdas: Dict[str, Tensor]  # name of the merge -> λ, (images, paths), in order of execution
    labels: Tensor  # (images,)
    predictions: Tensor  # (images,), the class of the largest logit


class Ablation(NamedTuple):
    """Top-1 accuracies, in percent."""
    top1: float  # of the network as it is
    constant: float  # with every λ at its mean over the images: weighed, but all images alike
    all: float  # with all merges at the identity, λ = 1/n: plain sums and concatenations
    merges: Dict[str, float]  # name of the merge -> with it alone at the identity, in order of execution


def observe(model: nn.Module, batches: Batches) -> Observed:
    """λ of every merge for every image, and what the network takes each image for.

    Args:
        model: A model with merges; evaluated in eval mode, every module is left in the mode that it was in.
        batches: Images, (batch, in_chans, height, width), and labels, (batch,), of any device. They are not kept.

    Raises:
        ValueError: The model has no merge, or there are no images.
    """
    device = next(model.parameters()).device
    parts: Dict[str, List[Tensor]] = {}
    labels: List[Tensor] = []
    predictions: List[Tensor] = []
    with record_mixing_weights(model) as lambdas, _eval_mode(model):
        for images, target in batches:
            with torch.inference_mode():  # not around the loop, where data make tensors of their own
                logits = model(images.to(device))
            predictions.append(logits.argmax(1).cpu())
            labels.append(target.cpu())
            for name, value in lambdas.items():
                parts.setdefault(name, []).append(value.cpu())
    if not labels:
        raise ValueError('There are no images.')
    return Observed({name: torch.cat(values) for name, values in parts.items()}, torch.cat(labels),
                    torch.cat(predictions))


def collect_mixing_weights(model: nn.Module, images: Iterable[Tensor]) -> Dict[str, Tensor]:
    """λ of every merge for every image, as `observe` has it, of images without labels.

    Args:
        model: A model with merges; evaluated in eval mode, every module is left in the mode that it was in.
        images: Batches, (batch, in_chans, height, width).

    Returns:
        Name of the merge -> (images, paths) on the CPU, in order of execution.

    Raises:
        ValueError: The model has no merge, or there are no images.
    """
    return observe(model, ((batch, torch.full((len(batch),), -1)) for batch in images)).lambdas  # -1: as timm has it


@contextmanager
def identity_merges(model: nn.Module, names: Optional[Sequence[str]] = None) -> Iterator[None]:
    """Inside the `with` block merges are at the identity, λ = 1/n: plain sums and concatenations.

    Args:
        model: A model with merges, itself or wrapped as for `record_mixing_weights`.
        names: Of the merges, as `record_mixing_weights` has them; all if not given.

    Raises:
        ValueError: A merge is not there, or there is none at all.
    """
    mixes = _mixes(model)
    names = list(mixes) if names is None else names
    for name in names:
        if name not in mixes:
            raise ValueError(f'{type(model).__name__} has no AWM merge {name!r}.')
    with _constant_merges(mixes, {name: torch.ones(mixes[name].num_paths) for name in names}):
        yield


@contextmanager
def _constant_merges(mixes: Mapping[str, MixingWeights], scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with` block merges have n · λ, (paths,), whatever the image."""
    def hook_of(constant: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, args, own: constant.to(own).expand_as(own)

    handles = [mixes[name].register_forward_hook(hook_of(constant)) for name, constant in scales.items()]
    try:
        with torch.compiler.set_stance('force_eager'):  # compiled code would not call the hooks
            yield
    finally:
        for handle in handles:
            handle.remove()


def ablate(model: nn.Module, batches: Batches, lambdas: Mapping[str, Tensor]) -> Ablation:
    """Accuracy without what the merges do: with λ alike for all images, and, after training, set back to the identity.

    Every batch goes through the network once for each merge, and three times more.

    Args:
        model: As for `observe`.
        batches: As for `observe`; the labels are classes of the model.
        lambdas: Name of every merge -> λ, (images, paths), of which the mean is taken: `observe(...).lambdas`.

    Raises:
        ValueError: The model has no merge, or λ of one is not given, or there are no images.
    """
    device = next(model.parameters()).device
    mixes = _mixes(model)
    missing = mixes.keys() - lambdas.keys()
    if missing:
        raise ValueError(f'λ of the merges {sorted(missing)} is not given.')
    means = {name: mix.num_paths * lambdas[name].mean(0) for name, mix in mixes.items()}
    ones = {name: torch.ones(mix.num_paths) for name, mix in mixes.items()}
    settings = [{}, means, ones, *({name: scales} for name, scales in ones.items())]
    correct, count = [0] * len(settings), 0
    with _eval_mode(model):
        for images, target in batches:
            images, target = images.to(device), target.to(device)
            count += len(target)
            for i, scales in enumerate(settings):
                with _constant_merges(mixes, scales), torch.inference_mode():
                    correct[i] += int((model(images).argmax(1) == target).sum())
    if not count:
        raise ValueError('There are no images.')
    top1, constant, without_all, *without_one = (100 * n / count for n in correct)
    return Ablation(top1, constant, without_all, dict(zip(mixes, without_one)))


def _mixes(model: nn.Module) -> Dict[str, MixingWeights]:
    """The merges by the names that `record_mixing_weights` gives them; a ValueError if there are none."""
    mixes = {
        name.removesuffix('.mix'): module
        for name, module in unwrap_model(model).named_modules()
        if isinstance(module, MixingWeights)
    }
    if not mixes:
        raise ValueError(f'{type(model).__name__} has no AWM merge.')
    return mixes


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
