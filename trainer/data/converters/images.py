"""Whether an image can be used: inside the root, there, an image, no decompression bomb. Writing those of rows."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from trainer.data.converters.base import Rejected

MOST_PIXELS = 89_478_485  # where Pillow starts to warn of a bomb; it refuses only past twice that


class ImageChecker:
    """Looks at the header of images below a root; pixels are not decoded."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.root = Path(os.path.realpath(root))
        self.follow_links = follow_links

    def problem(self, image: str) -> tuple[str, str] | None:
        """Kind and text of what is wrong with an image, None if nothing is."""
        path = self.root / image
        try:
            if not self.follow_links and not Path(os.path.realpath(path)).is_relative_to(self.root):
                return "outside the image root", f"image {image} is a link out of the image root (see follow_links)"
            if not path.is_file():
                return "missing image", f"image {image} does not exist below {self.root}"
            check_header(path)
        except Rejected as error:
            return error.kind, f"image {image}: {error}"
        except (OSError, ValueError) as error:  # a name that is too long, a loop of links
            return "unreadable image", f"image {image}: {error}"
        return None


def check_header(file: Path | object) -> str:
    """Format of an image file, from its header.

    Raises:
        Rejected: not an image, or too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as picture:  # type: ignore[arg-type]
                width, height, kind = picture.width, picture.height, picture.format or ""
        except Image.DecompressionBombError as error:
            raise Rejected("decompression bomb", str(error)) from error
        except UnidentifiedImageError as error:  # its own words are the address of an object in memory
            raise Rejected("unreadable image", "its content is no image that Pillow knows") from error
        except Exception as error:  # Pillow's plugins raise whatever a broken header makes them stumble over
            raise Rejected("unreadable image", f"{type(error).__name__}: {error}") from error
    if width * height > MOST_PIXELS:
        raise Rejected("decompression bomb", f"{width} x {height} pixels, more than {MOST_PIXELS}")
    return kind


def write_image(image: str | bytes, output: Path) -> str:
    """Writes an image below ``images`` of `output`, named by what is in it, if it is not there yet.

    Args:
        image: content of a file; as text in base64, with white space or without.

    Returns:
        its path below `output`.

    Raises:
        Rejected: not base64, not an image, or too many pixels.
    """
    try:
        content = image if isinstance(image, bytes) else base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("unreadable image", f"not base64: {error}") from error
    kind = check_header(io.BytesIO(content))
    digest = hashlib.sha256(content).hexdigest()
    name = f"images/{digest[:2]}/{digest}.{kind.lower()}"
    path = output / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two workers may meet the same image
        partial.write_bytes(content)
        partial.replace(path)
    return name
