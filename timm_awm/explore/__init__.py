"""The page of `timm-awm explore`: which paths networks take for one picture, and what they would do on others."""
from .intervention import Explored
from .page import explore
from .pictures import MEGAPIXELS, read_picture
