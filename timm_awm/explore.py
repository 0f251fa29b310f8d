"""The page of `timm-awm explore`: which paths networks take for one picture, and what they would do on others."""
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

os.environ.update(GRADIO_ANALYTICS_ENABLED='False', GRADIO_RUN_HISTORY='False')  # read as it is imported

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor

from .analysis.profile import depth_figure, label_merges, plot_paths, short_name
from .analysis.reference import ALL, read_reference
from .analysis.run import model_labels
from .hub import export_run, load_folder, pull
from .hub.folder import CONFIG
from .layers import MixingWeights, record_mixing_weights
from .layers.record import find_merges, hook_merges

__all__ = ['Explored', 'explore', 'make_page', 'read_picture', 'resolve_models']

FORMATS = 'PNG', 'JPEG', 'WEBP', 'GIF'
MEGAPIXELS = 50  # what is larger is not decoded
NONE = 'none'


def resolve_models(names: Sequence[str], temporary: Path) -> Dict[str, Path]:
    """The Hub folders of models by labels for the page.

    Args:
        names: Each `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or a folder: a Hub folder or a run of train.py.
        temporary: Where runs are exported to.

    Raises:
        ValueError: There is no such model; or as `pull` and `export_run` raise.
    """
    names = [
        name if name.startswith('hf-hub:') else str(Path(name.removeprefix('local-dir:')).resolve()) for name in names]
    labels = model_labels(names, [None] * len(names))
    return {label: _resolve(name, temporary / label) for label, name in zip(labels, names)}


def _resolve(name: str, exported: Path) -> Path:
    if name.startswith('hf-hub:'):
        return pull(name.removeprefix('hf-hub:')).folder
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(
            f'There is no folder {folder}. A model is hf-hub:OWNER/NAME, local-dir:FOLDER or the folder of a run of '
            'train.py.')
    if (folder / CONFIG).is_file():
        return folder
    export_run(folder, exported)
    return exported


def read_picture(path: str) -> Image.Image:
    """The picture in a file, upright, its first frame if it moves, on white where it is transparent.

    Raises:
        ValueError: It is no picture, damaged, too large or too thin, or gone.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            short, long = sorted(file.size)
            if short * long > 1e6 * MEGAPIXELS or long > 100 * short:  # thin ones grow as they are resized
                raise Image.DecompressionBombError(f'{file.width} x {file.height} pixels')
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I;16'):
                image = image.point(lambda value: value / 256).convert('L')
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except Image.DecompressionBombError as error:
        raise ValueError(
            f'The picture is too large or too thin ({error}): take one of at most {MEGAPIXELS} million pixels, and at '
            'most 100 times as long as wide.') from error
    except FileNotFoundError as error:
        raise ValueError('The picture has been deleted after some minutes: drop it again.') from error
    except Exception as error:  # of Pillow's readers
        raise ValueError('This file cannot be read as a picture: take a whole PNG, JPEG, WebP or GIF.') from error


class Seen(NamedTuple):
    """What a network makes of a picture."""
    probabilities: Tensor  # (classes,)
    lambdas: Dict[str, Tensor]  # name of the merge -> λ, (1, paths)


class Explored:
    """A model, ready to be shown pictures.

    Args:
        folder: Its Hub folder.
        label: Names it on the page.

    Raises:
        ValueError: It holds no whole AWM model, one without classes, or what it is compared with is of another.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.label = label
        self.model = load_folder(folder).eval()
        self.lock = Lock()  # one picture at a time: hooks change the merges for all
        self.mixes: Dict[str, MixingWeights] = {}
        if any(isinstance(module, MixingWeights) for module in self.model.modules()):  # else the plain control
            self.mixes = find_merges(self.model)
        self.reference = read_reference(folder, {name: mix.num_paths for name, mix in self.mixes.items()})
        self.residual = all(mix.num_paths == 2 for mix in self.mixes.values())
        config: Any = self.model.pretrained_cfg
        names = list(config.get('label_names') or range(self.model.num_classes))
        self.classes = [str(name) if names.count(name) == 1 else f'{name} ({i})' for i, name in enumerate(names)]
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
        """λ of the picture: of a ResNet over the depth, beside what the reference has; of a DenseNet as a heat map."""
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
            ax.plot(merges, mean, color=color, label=f'{label}: mean ± one standard deviation')
            ax.fill_between(merges, mean - std, mean + std, color=color, alpha=0.2)
        ax.plot(merges, [float(value[0, 0]) for value in seen.lambdas.values()], 'o-', label='this picture', lw=2)
        ax.axhline(0.5, color='black', linestyle='--', lw=1, label='plain: both weigh the same')
        label_merges(ax, [list(seen.lambdas)])
        ax.set_ylabel('λ1, the weight of the convolutions F(x)')
        ax.legend()
        return figure


def make_page(models: Sequence[Explored], examples: Sequence[str] = ()) -> gr.Blocks:
    """The page.

    Args:
        models: Side by side.
        examples: Files of pictures to choose from.
    """
    def show(path: Optional[str], *settings: Any) -> List[Any]:
        """Classes, effect and figure of every model."""
        if path is None:
            return [None, '', None] * len(models)
        try:
            image = read_picture(path)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        results: List[Any] = []
        for n, model in enumerate(models):
            plain, seen = model.look(image), model.look(image, *settings[3 * n:3 * n + 3])
            top = seen.probabilities.topk(min(5, len(model.classes)))
            results += [
                {model.classes[i]: p for i, p in zip(top.indices.tolist(), top.values.tolist())},
                _effect(model.classes, plain, seen), model.draw(seen)]
        return results

    with gr.Blocks(title='timm-awm explore', delete_cache=(60, 600)) as page:
        gr.Markdown(
            '# Which paths does the network take?\n'
            'A merge weighs its paths for each picture anew: in a ResNet the convolutions F(x) by λ1, and the shortcut '
            'x by 1 − λ1. '
            'Drop a picture, then change merges and see what becomes of the prediction.')
        with gr.Row():
            picture: Any = gr.Image(label='Picture', type='filepath', sources=['upload', 'clipboard'], height=300)
            # opened by `read_picture`, which says what is wrong with it
            picture.preprocess = lambda payload: payload and payload.path
            if examples:
                gr.Examples([[path] for path in examples], picture)
        inputs: List[Any] = [picture]
        outputs: List[Any] = []
        with gr.Row():
            for model in models:
                with gr.Column(min_width=320):
                    gr.Markdown(f'## {model.label}\n{_about(model)}')
                    outputs += [gr.Label(label='Classes'), gr.Markdown()]
                    outputs.append(gr.Plot(show_label=False, visible=bool(model.mixes)))
                    with gr.Accordion('Change merges', visible=bool(model.mixes)):
                        inputs += [
                            gr.CheckboxGroup(
                                [(short_name(name), name) for name in model.mixes], show_select_all=True,
                                label='Set back to the identity, λ = 1/n'),
                            gr.Dropdown(
                                [NONE, *model.connections], value=NONE, label='Set by hand, whatever is ticked'),
                            gr.Slider(0, 1, 0.5, step=0.01, label='λ of what is set by hand')]
        shown = gr.on(
            [item.change for item in inputs], show, inputs, outputs, trigger_mode='always_last',
            show_progress='minimal')
        shown.failure(lambda: [None] * (1 + len(outputs)), outputs=[picture, *outputs])
    return page


def _about(model: Explored) -> str:
    if not model.mixes:
        return 'A plain network, without merges.'
    if model.reference is None:
        return 'There is nothing to compare with: `timm-awm analyze local-dir:FOLDER ...` adds it to a Hub folder.'
    return f'Beside {model.reference["groups"][ALL]["images"]:,} images of {model.reference["data"]}.'


def _effect(classes: Sequence[str], plain: Seen, seen: Seen) -> str:
    """What changed merges do to the prediction."""
    p, q = plain.probabilities, seen.probabilities
    if torch.equal(p, q):
        return ''
    before, now = int(p.argmax()), int(q.argmax())
    text = f'As it is: **{classes[before]}** {p[before]:.1%}. With these merges: **{classes[now]}** {q[now]:.1%}'
    return f'{text}.' if now == before else f'{text}, {classes[before]} {q[before]:.1%}.'


def draw_examples(folder: Path) -> List[str]:
    """Writes scikit-learn's pictures: two photographs and a handwritten digit."""
    photographs = load_sample_images()
    pictures = {Path(name).name: pixels for name, pixels in zip(photographs.filenames, photographs.images)}
    pictures['digit.png'] = np.uint8(255 - 255 / 16 * load_digits().images[3])
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / name)
    return [str(folder / name) for name in pictures]


def explore(models: Sequence[str], host: str = '127.0.0.1', port: Optional[int] = None) -> None:
    """Serves the page until it is interrupted.

    Args:
        models: As for `resolve_models`.
        host: Address to listen on.
        port: The first free one from 7860 if not given.

    Raises:
        OSError, OverflowError: The port cannot be had.
        RuntimeError, ValueError: A model cannot be had.
    """
    with tempfile.TemporaryDirectory() as temporary:
        os.environ['GRADIO_TEMP_DIR'] = str(Path(temporary, 'uploads'))  # visitors may read what is there
        explored = [Explored(path, label) for label, path in resolve_models(models, Path(temporary)).items()]
        page = make_page(explored, draw_examples(Path(temporary)))
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size='50mb',
            show_error=True,
            quiet=True,
            footer_links=[],
            theme=gr.themes.Base(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            prevent_thread_lock=True,
        )
        print(f'The page is at http://{host}:{page.server_port}/ until you press Ctrl+C.', flush=True)
        page.block_thread()
