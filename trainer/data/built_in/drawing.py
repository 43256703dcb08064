"""Canvas, letters and pictograms: everything that touches Pillow's fonts.

Basic layout and a font shipped inside Pillow (Aileron, CC0) or a wheel: the same pixels on every machine
that has the same Pillow.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from trainer.data.built_in.material import emoji_characters, emoji_font_file

SIDE = 160  # pixels; five cells of a stride-32 encoder
Colour = tuple[int, int, int]

# Light enough for black text and dark outlines, far enough apart to be told by name.
BACKGROUNDS: dict[str, Colour] = {
    "blue": (178, 214, 252),
    "green": (186, 234, 178),
    "yellow": (253, 242, 150),
    "pink": (253, 192, 214),
    "purple": (216, 192, 248),
    "orange": (253, 208, 154),
    "gray": (200, 200, 200),
    "white": (252, 252, 252),
}
# Fainter edge pixels are dropped from a sprite, so that its box is what an eye sees.
MIN_ALPHA = 32
_MEASURED_AT = 72


def canvas(colour: Colour) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), colour)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return loaded


@lru_cache(maxsize=64)
def _emoji_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(emoji_font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def sprite(short_name: str, longest_side: int) -> Image.Image:
    """The emoji as RGBA, cut to its visible pixels, its longer side about ``longest_side`` pixels."""
    # Glyphs fill different shares of the em square: measure once at a known size, then draw at the right one.
    return _drawn(short_name, round(_MEASURED_AT * longest_side / _longest_side(short_name)))


@lru_cache(maxsize=4096)
def _longest_side(short_name: str) -> int:
    return max(_drawn(short_name, _MEASURED_AT).size)


def _drawn(short_name: str, size: int) -> Image.Image:
    tile = Image.new("RGBA", (2 * size, 2 * size), (0, 0, 0, 0))
    position = (size // 2, size // 2)
    character = emoji_characters()[short_name]
    ImageDraw.Draw(tile).text(position, character, font=_emoji_font(size), embedded_color=True)
    tile.putalpha(tile.getchannel("A").point(lambda a: a if a >= MIN_ALPHA else 0))
    box = tile.getchannel("A").getbbox()
    assert box is not None, f"the emoji font has no picture of {short_name}"
    return tile.crop(box)


def write_text(
    image: Image.Image,
    position: tuple[int, int],
    text: str,
    size: int,
    *,
    colour: str = "black",
    anchor: str = "mm",
    stroke: float = 0.0,
) -> None:
    """Draw a line of text; ``anchor`` as in Pillow, ``stroke`` thickens the letters."""
    letters, (left, top) = _letters(text, size, anchor, stroke)
    image.paste(colour, (position[0] + left, position[1] + top), letters)


@lru_cache(maxsize=2048)  # drawing letters takes longer than all the rest of a chart, and labels come back
def _letters(text: str, size: int, anchor: str, stroke: float) -> tuple[Image.Image, tuple[int, int]]:
    tile = Image.new("L", (4 * SIDE, 2 * SIDE))
    middle = (2 * SIDE, SIDE)
    ImageDraw.Draw(tile).text(middle, text, fill=255, font=font(size), anchor=anchor, stroke_width=stroke)
    box = tile.getchannel("L").getbbox()
    assert box is not None, f"nothing to see in {text!r}"
    return tile.crop(box), (box[0] - middle[0], box[1] - middle[1])


def text_width(text: str, size: int, stroke: int = 0) -> int:
    left, _, right, _ = font(size).getbbox(text, stroke_width=stroke)
    return int(right - left)


def fitting_size(text: str, width: int, largest: int, smallest: int = 9, stroke: int = 0) -> int:
    """The largest font size at which ``text`` is at most ``width`` pixels wide."""
    size = largest
    widest = text_width(text, largest, stroke)
    if widest > width:  # widths grow almost in proportion to sizes: start close to the answer
        size = min(largest, largest * width // widest + 1)
    while size > smallest and text_width(text, size, stroke) > width:
        size -= 1
    return size


def wrapped(text: str, size: int, width: int, stroke: int = 0) -> list[str]:
    """Words broken into lines of at most ``width`` pixels (a longer word keeps its own line)."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size, stroke) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
