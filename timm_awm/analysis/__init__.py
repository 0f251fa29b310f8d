"""What the merges of trained networks do: the analyses behind the paper's Figs. 6, 7 and 10, and some more."""
from .command import Settings, run
from .observe import Ablation, Observed, ablate, collect_mixing_weights, identity_merges, observe
from .plots import (
    plot_ablations,
    plot_class_means,
    plot_contact_sheet,
    plot_cumulative_matches,
    plot_path_profile,
    plot_profile,
    plot_profiles,
)
from .statistics import (
    Profile,
    as_features,
    between_class_share,
    class_means,
    cumulative_match,
    profile,
    rank_images,
    reduce_pixels,
)
