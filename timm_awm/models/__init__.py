from . import awm_densenet, awm_resnet
from .awm_densenet import *
from .awm_resnet import *
