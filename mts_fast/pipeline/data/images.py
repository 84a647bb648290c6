"""One picture, one result, however it is stored: depth, palette, CMYK, orientation, alpha."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# formats that are read, whatever the extension says; MPO is read as JPEG
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP")
EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
# larger pictures are taken for a mistake or an attack
LARGEST_PIXELS = 178_956_970
# transparent areas show it
BACKGROUND = (255, 255, 255)
SIXTEEN_BIT = 65535
EIGHT_BIT_STEP = 257

# what Pillow's decoders raise on damaged files
DAMAGES = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError)

# all of Pillow's readers; without it only the commonest are known
Image.init()


class UnreadableImage(Exception):
    """A file that is no whole picture; the message says why."""


def read_image(content: bytes) -> Image.Image:
    """The first frame of a picture as 8-bit RGB, upright, transparent areas white.

    Raises:
        UnreadableImage: empty, cut off, of no known format, or giant; never half a picture.
    """
    if not content:
        raise UnreadableImage("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > LARGEST_PIXELS:
                    raise UnreadableImage(f"{image.width} x {image.height} pixels")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UnreadableImage(f"of no known image format, begins with {content[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(str(error)) from None
    except DAMAGES as error:
        raise UnreadableImage(f"damaged: {error}") from None


def shorter_side(content: bytes) -> int | None:
    """In pixels, of the header alone; None where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return min(image.size)
    except (*DAMAGES, Image.DecompressionBombError):
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        below = Image.new("RGBA", layers.size, (*BACKGROUND, 255))
        return Image.alpha_composite(below, layers).convert("RGB")
    return image.convert("RGB")


def _from_deep(values: np.ndarray) -> Image.Image:
    """Grey values of 16 bits or more, or floats in [0, 1], scaled to 8 bits."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UnreadableImage("of floating-point values outside [0, 1]")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    deep = values.astype(np.int64)
    if deep.min() < 0 or deep.max() > SIXTEEN_BIT:
        raise UnreadableImage("of integers outside 16 bits")
    return Image.fromarray(((deep + EIGHT_BIT_STEP // 2) // EIGHT_BIT_STEP).astype(np.uint8))
