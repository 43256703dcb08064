"""Whether an image can be used: inside the root, there, an image, and not a decompression bomb."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image

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
        except Exception as error:  # Pillow's plugins raise whatever a broken header makes them stumble over
            raise Rejected("unreadable image", f"{type(error).__name__}: {error}") from error
    if width * height > MOST_PIXELS:
        raise Rejected("decompression bomb", f"{width} x {height} pixels, more than {MOST_PIXELS}")
    return kind
