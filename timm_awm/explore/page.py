"""The page: a picture, and beside it what each network makes of it."""
import base64
import html
import io
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any, List, Optional, Sequence

os.environ.update(GRADIO_ANALYTICS_ENABLED='False', GRADIO_RUN_HISTORY='False')  # read as it is imported

import gradio as gr
import torch

from ..analysis.figures import short_name
from ..analysis.names import resolve_models
from ..analysis.reference import ALL
from .intervention import Explored, Seen
from .pictures import draw_examples, read_picture


def make_page(models: Sequence[Explored], examples: Sequence[str]) -> gr.Blocks:
    """The page, with models side by side, and files of pictures to choose from."""
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
                _effect(model, plain, seen), _figure(model, seen)]
        return results

    with gr.Blocks(title='timm-awm explore', delete_cache=(60, 600)) as page:
        gr.Markdown(
            '# Which paths does the network take?\n'
            'A merge weighs its paths for each picture anew: in a ResNet the convolutions F(x) by λ1, and the shortcut '
            'x by 1 − λ1. Drop a picture, then change merges and see what becomes of the prediction.')
        with gr.Row():
            picture: Any = gr.Image(label='Picture', type='filepath', sources=['upload', 'clipboard'], height=300)
            # opened by `read_picture`, which says what is wrong with it
            picture.preprocess = lambda payload: payload and payload.path
            chosen = gr.Examples([[path] for path in examples], picture)
        inputs: List[Any] = [picture]
        outputs: List[Any] = []
        with gr.Row():
            for model in models:
                with gr.Column(min_width=320):
                    gr.Markdown(f'## {_literal(model.label)}\n{_about(model)}')
                    outputs += [gr.Label(label='Classes'), gr.Markdown(), gr.HTML(visible=bool(model.mixes))]
                    with gr.Accordion('Change merges', visible=bool(model.mixes)):
                        inputs += [
                            gr.CheckboxGroup(
                                [(short_name(name), name) for name in model.mixes], show_select_all=True,
                                label='Set back to the identity, λ = 1/n'),
                            gr.Dropdown(
                                ['none', *model.connections], value='none', label='Set by hand, whatever is ticked'),
                            gr.Slider(0, 1, 0.5, step=0.01, label='λ of what is set by hand')]
        # an upload changes a picture twice
        triggers = [picture.upload, picture.clear, *(item.change for item in inputs[1:])]
        shown = gr.on(triggers, show, inputs, outputs, trigger_mode='always_last', show_progress='minimal')
        chosen.load_input_event.then(show, inputs, outputs, show_progress='minimal')
        shown.failure(lambda: [None] * (1 + len(outputs)), outputs=[picture, *outputs])
    return page


def _literal(text: str) -> str:
    """A text from people as Markdown shows it as it is."""
    return re.sub(r'([^\w\s]|_)', r'\\\1', text)


def _about(model: Explored) -> str:
    if not model.mixes:
        return 'A plain network, without merges.'
    if model.reference is None:
        return 'There is nothing to compare with: `timm-awm analyze local-dir:FOLDER ...` adds it to a Hub folder.'
    return f'Beside {model.reference["groups"][ALL]["images"]:,} images of {_literal(model.reference["data"])}.'


def _effect(model: Explored, plain: Seen, seen: Seen) -> str:
    """Says what changed merges do to the prediction."""
    if torch.equal(plain.probabilities, seen.probabilities):
        return ''
    (p, old), (q, new) = (of.probabilities.max(0) for of in (plain, seen))
    before, now = (_literal(model.classes[int(i)]) for i in (old, new))
    return f'As it is: **{before}** {p:.1%}. With these merges: **{now}** {q:.1%}.'


def _figure(model: Explored, seen: Seen) -> Optional[str]:
    """The figure for the page, with λ as its text alternative."""
    if not seen.lambdas:
        return None
    file = io.BytesIO()
    model.draw(seen).savefig(file)
    data = base64.b64encode(file.getvalue()).decode()
    weights = '; '.join(
        f'{short_name(name)} {", ".join(f"{x:.2f}" for x in value[0])}' for name, value in seen.lambdas.items())
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(f"λ of this picture: {weights}")}">'


def explore(models: Sequence[str], host: str = '127.0.0.1', port: Optional[int] = None) -> None:
    """Serves the page until it is interrupted.

    Args:
        models: As for `resolve_models`.
        host: Address to listen on.
        port: The first free one from 7860 if not given.

    Raises:
        OSError, OverflowError, ValueError: The address, the port or a model cannot be had.
    """
    host = host.strip('[]')
    socket.create_server((host, port or 0), family=socket.AF_INET6 if ':' in host else socket.AF_INET).close()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ['GRADIO_TEMP_DIR'] = str(Path(temporary, 'uploads'))  # visitors may read what is there
        explored = [Explored(source, label) for label, source in resolve_models(models, Path(temporary)).items()]
        os.environ['no_proxy'] = '*'  # Gradio asks the page whether it is there
        page = make_page(explored, draw_examples(Path(temporary)))
        address = f'[{host}]' if ':' in host else host
        page.launch(
            server_name=address, server_port=port, share=False, max_file_size='50mb', show_error=True, quiet=True,
            footer_links=[], prevent_thread_lock=True,
            theme=gr.themes.Base(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            css='.prose h2 { font-size: min(1.5em, 5vw) !important; overflow-wrap: anywhere }',
        )
        print(f'The page is at http://{address}:{page.server_port}/ until you press Ctrl+C.', flush=True)
        page.block_thread()
