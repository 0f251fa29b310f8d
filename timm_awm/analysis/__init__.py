"""What the merges of trained networks do: the analyses of the paper's Figs. 6, 7 and 10, and ablations."""
from .ablation import Ablation, ablate, identity_merges, plot_ablations
from .discriminant import as_features, cumulative_match, plot_cumulative_matches, reduce_pixels
from .inputs import ImageData, create_model
from .observe import Observed, collect_mixing_weights, observe
from .profile import (
    Profile,
    between_class_share,
    class_means,
    plot_class_means,
    plot_path_profile,
    plot_profile,
    plot_profiles,
    profile,
)
from .ranking import plot_contact_sheet, rank_images
from .run import analyze
