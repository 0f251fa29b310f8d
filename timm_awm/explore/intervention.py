"""A network shown a picture: what it infers, as it is and with mixing weights set by hand."""
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor

from ..analysis.figures import HARDLY, depth_figure, label_merges, literal, short_name, widen
from ..analysis.names import Source
from ..analysis.profile import plot_paths
from ..analysis.reference import ALL, read_reference
from ..hub import load_folder
from ..hub.folder import class_names
from ..layers import MixingWeights, record_mixing_weights
from ..layers.record import find_merges, hook_merges

__all__ = ['NONE', 'Explored', 'Seen']

NONE = 'none'


class Seen(NamedTuple):
    """What a network makes of a picture."""
    probabilities: Tensor  # (classes,)
    lambdas: Dict[str, Tensor]  # name of the merge -> λ, (1, paths)


class Explored:
    """A model, ready to be shown pictures.

    Args:
        source: Its Hub folder, or the name that timm has for it.
        label: Names it on the page.

    Raises:
        ValueError: It holds no whole model, one without classes, or what it is compared with is of another.
    """

    def __init__(self, source: Source, label: str) -> None:
        self.label = label
        local = isinstance(source, Path)
        self.model = (load_folder(source) if local else timm.create_model(source, pretrained=True)).eval()
        self.lock = Lock()  # one picture at a time: hooks change the merges for all
        self.mixes: Dict[str, MixingWeights] = {}
        if any(isinstance(module, MixingWeights) for module in self.model.modules()):  # else the plain control
            self.mixes = find_merges(self.model)
        paths = {name: mix.num_paths for name, mix in self.mixes.items()}
        self.reference = read_reference(source, paths) if local else None
        self.residual = all(number == 2 for number in paths.values())
        config: Any = self.model.pretrained_cfg
        names = class_names(config.get('label_names'), self.model.num_classes)
        counts = Counter(names)
        self.classes = [name if counts[name] == 1 else f'{name} ({i})' for i, name in enumerate(names)]
        data = resolve_input_data_config(self.model)
        self.transform = create_transform(**data)
        channels = data['input_size'][0]
        if not self.classes or channels not in (1, 3):
            raise ValueError(f'{label} has {len(self.classes)} classes and takes {channels} channels: the page needs '
                             'classes, and networks for pictures in colour or grey.')
        self.mode = 'RGB' if channels == 3 else 'L'

    @property
    def connections(self) -> List[str]:
        """Names of what can be set: the merges of a ResNet; the paths of each merge of a DenseNet."""
        if self.residual:
            return [short_name(name) for name in self.mixes]
        return [f'{short_name(name)}, path {i + 1}' for name, mix in self.mixes.items() for i in range(mix.num_paths)]

    def look(
            self,
            picture: Image.Image,
            identity: Sequence[str] = (),
            connection: str = NONE,
            value: float = 0.5,
    ) -> Seen:
        """Infers the classes and λ.

        Args:
            picture: In RGB.
            identity: Merges to set back to λ = 1/n.
            connection: One of `connections` to set; the other paths of its merge share the rest as they do by
                themselves.
            value: Its λ, from 0 to 1.
        """
        chosen, _, path = connection.partition(', path ')
        index = int(path or 1) - 1

        def change(name: str, mix: MixingWeights, scales: Tensor) -> Optional[Tensor]:
            if short_name(name) == chosen:
                others = scales.clamp_min(1e-30)  # where λ is 1 they may have underflowed
                others[:, index] = 0
                scales = (1 - value) * others / others.sum(1, keepdim=True)
                scales[:, index] = value
                return mix.num_paths * scales
            return torch.ones_like(scales) if name in identity else None

        image = self.transform(picture.convert(self.mode))[None]  # type: ignore[operator]
        with self.lock, ExitStack() as stack, torch.inference_mode():
            lambdas: Dict[str, Tensor] = {}
            if self.mixes:
                stack.enter_context(hook_merges(self.mixes, change))
                lambdas = stack.enter_context(record_mixing_weights(self.model))
            probabilities = self.model(image)[0].softmax(0)
        return Seen(probabilities, dict(lambdas))

    def draw(self, seen: Seen) -> Optional[Figure]:
        """λ of the picture: of a ResNet over the depth, beside what the reference has; of a DenseNet as heat maps."""
        if not seen.lambdas:
            return None
        predicted = int(seen.probabilities.argmax())
        found = self.reference['groups'] if self.reference else {}
        groups = {
            label: found[key]['merges']
            for key, label in ((ALL, 'all images'), (str(predicted), self.classes[predicted])) if key in found}
        if not self.residual:
            maps = {'this picture': {name: value[0].numpy() for name, value in seen.lambdas.items()}}
            for label, of_merges in groups.items():
                maps[f'mean of {label}'] = {name: np.array(values['mean']) for name, values in of_merges.items()}
            stds = found and {name: np.array(values['std']) for name, values in found[ALL]['merges'].items()}
            return plot_paths(maps, self.label, stds or None)
        figure, ax = depth_figure(len(seen.lambdas))
        figure.set_size_inches(max(5.5, 0.2 * len(seen.lambdas)), 4)  # to be read on a phone
        merges = range(1, len(seen.lambdas) + 1)
        for (label, of_merges), color in zip(groups.items(), ('gray', 'tab:orange')):
            mean, std = (np.array([of_merges[name][what][0] for name in seen.lambdas]) for what in ('mean', 'std'))
            ax.plot(merges, mean, color=color, label=literal(f'{label}: mean ± one standard deviation', 40))
            ax.fill_between(merges, mean - std, mean + std, color=color, alpha=0.2)
        ax.plot(merges, [float(value[0, 0]) for value in seen.lambdas.values()], 'o-', label='this picture', lw=2)
        ax.axhline(0.5, color='black', linestyle='--', lw=1, label='plain: both weigh the same')
        label_merges(ax, [list(seen.lambdas)])
        ax.set_ylabel('λ1, the weight of the convolutions F(x)')
        if widen(ax):
            ax.set_title(literal(HARDLY))
        ax.legend()
        return figure
