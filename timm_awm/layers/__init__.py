from .fused import set_fused_merge
from .merge import (
    ConcatMerge,
    MixingWeights,
    SumMerge,
    count_parameters,
    fused_concat,
    fused_sum,
    merge_parameters,
    renew_compiled_guards,
)
from .record import record_mixing_weights
