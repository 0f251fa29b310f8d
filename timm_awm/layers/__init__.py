from .fused import set_fused_merge
from .merge import ConcatMerge, SumMerge
from .mixing import MixingWeights, count_parameters
from .record import record_mixing_weights
from .registry import merge_parameters, renew_compiled_guards
