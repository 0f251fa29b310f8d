"""A look at what the merges of trained networks do: the analyses of the paper's Figs. 6, 7 and 10, and ablations."""
from .ablation import Ablation, ablate, plot_ablations
from .discriminant import as_features, cumulative_match, plot_cumulative_matches, reduce_pixels
from .inputs import ImageData
from .names import load_model, resolve_models
from .observed import Observed, collect_mixing_weights, observe
from .profile import Profile, between_class_share, plot_paths, plot_profiles, profile_merges
from .ranking import plot_contact_sheet, rank_images
from .report import analyze
