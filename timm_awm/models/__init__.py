from .awm_converted import convert
from .awm_densenet import AwmCifarDenseNet, AwmDenseNet, CifarDenseNet
from .awm_resnet import AwmCifarResNet, AwmResNet, CifarResNet
