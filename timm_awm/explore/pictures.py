"""Pictures of every kind that people have."""
from contextlib import suppress
from pathlib import Path
from typing import List

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images

FORMATS = 'PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF'
MEGAPIXELS = 50  # larger ones are not decoded


def read_picture(path: str) -> Image.Image:
    """The picture in a file, upright, its first frame if it moves, on white where it is transparent.

    Raises:
        ValueError: It is no picture, damaged, too large or too thin, or gone.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            short, long = sorted(file.size)
            if short * long > 1e6 * MEGAPIXELS or long > 100 * short:  # thin ones grow as they are resized
                raise Image.DecompressionBombError(f'{file.width} x {file.height} pixels')
            file.load()
            image: Image.Image = file
            with suppress(Exception):  # the pixels are whole, whatever stands beside them
                image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I;16'):
                image = image.point(lambda value: value / 256).convert('L')
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except Image.DecompressionBombError as error:
        raise ValueError(
            f'The picture is too large or too thin ({error}): take one of at most {MEGAPIXELS} million pixels, and at '
            'most 100 times as long as wide.') from error
    except FileNotFoundError as error:
        raise ValueError('The picture has been deleted after some minutes: drop it again.') from error
    except Exception as error:  # Pillow's readers raise all kinds
        raise ValueError(
            'This file cannot be read as a picture: take a whole PNG, JPEG, WebP, GIF, BMP or TIFF.') from error


def draw_examples(folder: Path) -> List[str]:
    """Writes scikit-learn's pictures: two photographs and a handwritten digit."""
    photographs = load_sample_images()
    pictures = {Path(name).name: pixels for name, pixels in zip(photographs.filenames, photographs.images)}
    pictures['digit.png'] = np.uint8(255 - 255 / 16 * load_digits().images[3])
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / name)
    return [str(folder / name) for name in pictures]
