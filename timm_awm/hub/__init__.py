"""AWM models in the Hugging Face Hub's format: written from a model or from a run of train.py, and published."""
from .export import export_run
from .folder import load_folder, save_for_hub
from .remote import push, push_space
