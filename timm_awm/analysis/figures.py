"""Parts that figures share: axes over the depth of a network, people's texts, scales that do not magnify noise."""
import textwrap
from typing import Optional, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LEAST_SPAN = 0.05  # on any scale: less is noise
HARDLY = 'The network has hardly moved from the identity:\nall of this lies within 0.05.'


def literal(text: str, width: int = 60, lines: Optional[int] = None) -> str:
    """A text from people, such as the name of a class, wrapped, which matplotlib shows as it is.

    It takes what stands between two `$` for mathematics, and leaves out of legends what begins with `_`.
    """
    text = text.encode(errors='replace').decode()  # names of files need not be valid
    text = '\n'.join(textwrap.wrap(text, width, max_lines=lines, placeholder='…')).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def depth_figure(merges: int) -> Tuple[Figure, Axes]:
    """A figure wide enough for so many merges."""
    figure = Figure(figsize=(max(8, 0.2 * merges), 5), layout='constrained')
    return figure, figure.subplots()


def label_merges(ax: Axes, models: Sequence[Sequence[str]]) -> None:
    """Ticks of the merges: by name where all models have the same, else by number."""
    names = models[0]
    ax.set_xlabel('merge, from the input to the output of the network')
    if all(other == names for other in models):
        ax.set_xticks(range(1, len(names) + 1), [short_name(name) for name in names], rotation=45, ha='right')
    else:
        ax.xaxis.set_major_locator(MaxNLocator(20, integer=True))


def short_name(name: str) -> str:
    """The name of a merge, for figures."""
    return name.removesuffix('.merge').removeprefix('features.')


def widen(ax: Axes, span: float = LEAST_SPAN) -> bool:
    """Makes a y axis span at least this much, with numbers as they are; says whether it spanned less."""
    ax.ticklabel_format(axis='y', style='plain', useOffset=False)
    low, high = ax.get_ylim()
    narrow = high - low < span
    if narrow:
        ax.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    return narrow
