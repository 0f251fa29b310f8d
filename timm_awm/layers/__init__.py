from .fused import set_fused_merge
from .merge import ConcatMerge, SumMerge
from .mixing import MixingWeights, count_parameters, merge_parameters, renew_compiled_guards
from .record import record_mixing_weights
