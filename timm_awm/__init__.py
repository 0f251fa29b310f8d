"""Active weighted mapping (AWM) for timm.

Importing this package registers the `awm_*` models and the `alternating` optimizer with timm. Inside timm's train.py it
also tells the optimizer the epoch and adds the crop mode `pad4`; elsewhere it changes nothing in timm.
"""
from importlib.metadata import version as _version

from . import layers, models, optim, train_script
from .convert import convert
from .layers import record_mixing_weights, set_fused_merge

__version__ = '0.1.0'

train_script.install()
