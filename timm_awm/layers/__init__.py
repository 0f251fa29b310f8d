from .functional import descriptor, mixing_logits, scaled_mixing_weights, weighted_concat, weighted_sum
from .fused import can_fuse, fused_concat, fused_merge, is_intercepted, map_moments, set_fused_merge
from .merge import ConcatMerge, MixingWeights, SumMerge, count_parameters, merge_parameters, renew_compiled_guards
from .record import record_mixing_weights
