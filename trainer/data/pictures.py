"""Image files as every model sees them: upright, in red, green and blue.

That is what ``load_image`` of transformers makes of a file, except of grey values of 16 bits, which it turns white.
"""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may name one

# Pillow would write lines of Python to stderr that name no image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


def open_image(path: Path) -> Image.Image:
    """The decoded image, turned as its EXIF orientation says."""
    with Image.open(path) as picture:
        return _as_seen(picture)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of :func:`open_image` in pixels, without decoding the file."""
    with Image.open(path) as picture:
        width, height = picture.size
        if picture.format == "TIFF" or (picture.format == "PNG" and not _may_be_turned(path)):
            return width, height  # Pillow turns a TIFF by itself; of a PNG it decodes all to find no orientation
        sideways = picture.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def oddity(path: Path) -> str | None:
    """What a model sees otherwise than a viewer shows it, or what makes the image a burden; None if it is ordinary.

    Raises:
        Exception: whatever Pillow's plugins stumble over in a file that does not decode.
    """
    with Image.open(path) as picture:
        _as_seen(picture)
        if picture.mode in ("I", "F"):
            low, high = picture.getextrema()
            if low < 0 or not 1 < high <= 255:
                return f"has values from {low:g} to {high:g}, taken with 0 as black and 255 as white; save it in 8 bits"
        if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            return "has transparent pixels, seen in the colour that they hide; flatten it onto a background"
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and picture.width * picture.height > most:
            return f"has {picture.width:,} x {picture.height:,} pixels, decoded anew each time; scale it down"
    return None


def _as_seen(picture: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))  # 65535 is white
    return upright.convert("RGB")


def _may_be_turned(png: Path) -> bool:
    with png.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(name) >= 0 for name in _PNG_ORIENTATIONS)
