"""Observing the mixing weights of a network over a data set."""
from typing import Dict, Iterable, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from ..layers import record_mixing_weights

Batches = Iterable[Tuple[Tensor, Tensor]]  # images, (batch, in_chans, height, width), and labels, (batch,)


class Observed(NamedTuple):
    """The findings of `observe`, on the CPU, in the order of the images."""
    lambdas: Dict[str, Tensor]  # name of the merge -> λ, (images, paths), in order of execution
    labels: Tensor  # (images,)
    predictions: Tensor  # (images,)

    @property
    def labelled(self) -> bool:
        """Whether there are labels, of two classes at least."""
        return 0 <= int(self.labels.min()) < int(self.labels.max())


def observe(model: nn.Module, batches: Batches) -> Observed:
    """λ of every merge and the prediction of the network for every image. Puts the model into eval mode.

    Raises:
        ValueError: The model has no merge, or there are no images.
    """
    device = next(model.parameters()).device
    parts: Dict[str, List[Tensor]] = {}
    labels: List[Tensor] = []
    predictions: List[Tensor] = []
    model.eval()
    with record_mixing_weights(model) as lambdas:
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
    """λ of every merge as in `observe`, for batches of images without labels."""
    without_labels = ((batch, batch.new_full((len(batch),), -1)) for batch in images)  # -1: as timm has it
    return observe(model, without_labels).lambdas
