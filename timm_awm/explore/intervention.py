"""A network shown a picture: what it infers, as it is and with mixing weights set by hand."""
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import Any, Dict, NamedTuple, Sequence

import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor

from ..analysis.figures import short_name
from ..analysis.names import Source, load_model
from ..analysis.profile import plot_depth, plot_paths, profile_merges
from ..analysis.reference import ALL, read_reference
from ..hub.folder import class_names
from ..layers import MixingWeights
from ..layers.record import find_merges, hook_merges


class Seen(NamedTuple):
    """The prediction of a network for a picture, and its mixing weights."""
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
        folder = source if isinstance(source, Path) else None
        self.model = load_model(source).eval()
        self.lock = Lock()  # one picture at a time: hooks change the merges for all
        self.mixes: Dict[str, MixingWeights] = {}
        if any(isinstance(module, MixingWeights) for module in self.model.modules()):  # else the plain control
            self.mixes = find_merges(self.model)
        paths = {name: mix.num_paths for name, mix in self.mixes.items()}
        self.reference = read_reference(folder, paths) if folder else None
        self.residual = all(number == 2 for number in paths.values())
        # what can be set: the merges of a ResNet; the paths of each merge of a DenseNet
        self.connections = {
            short_name(name) + ('' if self.residual else f', path {i + 1}'): (name, i)
            for name, number in paths.items() for i in range(1 if self.residual else number)}
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

    def look(
            self, picture: Image.Image, identity: Sequence[str] = (), connection: str = '', value: float = .5) -> Seen:
        """Infers the classes and λ.

        Args:
            picture: In RGB.
            identity: Merges to set back to λ = 1/n.
            connection: One of `connections` to set, if any. The other paths of its merge share the rest as they do
                by themselves.
            value: Its λ, from 0 to 1.
        """
        chosen, index = self.connections.get(connection, (None, 0))
        lambdas: Dict[str, Tensor] = {}

        def change(name: str, mix: MixingWeights, scales: Tensor) -> Tensor:
            if name == chosen:
                others = scales.clamp_min(1e-30)  # where λ is 1 they may have underflowed
                others[:, index] = 0
                scales = (1 - value) * others / others.sum(1, keepdim=True)
                scales[:, index] = value
                scales *= mix.num_paths
            elif name in identity:
                scales = torch.ones_like(scales)
            lambdas[name] = scales / mix.num_paths
            return scales

        image = self.transform(picture.convert(self.mode))[None]  # type: ignore[operator]
        with self.lock, hook_merges(self.mixes, change), torch.inference_mode():
            probabilities = self.model(image)[0].softmax(0)
        return Seen(probabilities, lambdas)

    def draw(self, seen: Seen) -> Figure:
        """λ of the picture: of a ResNet over the depth, beside what the reference has; of a DenseNet as heat maps."""
        predicted = int(seen.probabilities.argmax())
        groups = self.reference['groups'] if self.reference else {}
        lines = {
            f'mean of {name}': groups[key]['merges']
            for key, name in ((ALL, 'all images'), (str(predicted), self.classes[predicted])) if key in groups}
        lines['this picture'] = profile_merges(seen.lambdas)
        if not self.residual:
            return plot_paths(lines, self.label, groups[ALL]['merges'] if groups else None)
        figure = plot_depth(lines)
        figure.set_size_inches(max(5.5, 0.2 * len(seen.lambdas)), 4)  # to be read on a phone
        return figure
