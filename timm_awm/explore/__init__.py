"""The page of `timm-awm explore`: which paths networks take for one picture, and what they would do on others."""
from ..analysis.names import resolve_models
from .intervention import Explored, Seen
from .page import explore, make_page
from .pictures import MEGAPIXELS, draw_examples, read_picture
