from .profile import collect_mixing_weights, plot_profile
