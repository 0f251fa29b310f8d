"""Active weighted mapping (AWM) for timm.

Importing this package registers the `awm_*` models and the `alternating` optimizer with timm. It changes nothing else
in timm, except inside timm's own train.py.
"""
__version__ = '0.1.0'

from . import train_script
from .hub import save_for_hub
from .layers import ConcatMerge, SumMerge, record_mixing_weights, set_fused_merge
from .models import AwmDenseNet, AwmResNet, convert
from .optim import Alternating, set_epoch

__all__ = [
    'Alternating', 'AwmDenseNet', 'AwmResNet', 'ConcatMerge', 'SumMerge', 'convert', 'record_mixing_weights',
    'save_for_hub', 'set_epoch', 'set_fused_merge']

train_script.install()
