"""AWM models in the Hugging Face Hub's format: written from a model or from a run of train.py, published, fetched."""
from .card import describe
from .folder import load_folder, save_for_hub
from .remote import pull, push, push_space
from .run import export_run
