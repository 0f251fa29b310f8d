"""Active weighted mapping (AWM) for timm.

Importing this package registers the `awm_*` models, the `alternating` optimizer and the crop mode `pad4` with timm.
"""
from importlib.metadata import version as _version

from . import layers, models, optim, patches
from .convert import convert
from .layers import record_mixing_weights, set_fused_merge

__version__ = _version('timm-awm')

patches.install()
