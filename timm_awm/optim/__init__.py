from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from .alternating import Alternating, live, set_epoch
from .schedule import PhaseSchedule

default_registry.register(OptimInfo(
    name='alternating',  # no underscore: timm's factory drops a prefix that ends in one
    opt_class=Alternating,
    description='Trains backbone and AWM merges in alternating epochs with any other optimizer (base=..., period=...)',
    has_momentum=True,
    has_betas=True,
))
