"""Active weighted mapping (AWM) for timm.

Importing this package registers the `awm_*` models and the `alternating` optimizer with timm. It changes nothing else
in timm, except inside timm's own train.py.
"""
__version__ = '0.1.0'

from . import layers, models, optim, train_script
from .convert import convert
from .layers import record_mixing_weights, set_fused_merge

train_script.install()
