"""Image files as models see them: compared with transformers' own ``load_image``, bit by bit."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from transformers.image_utils import load_image

from trainer.data.encoding import ConversationEncoder
from trainer.data.lengths import token_counter
from trainer.data.pictures import image_size, oddity, open_image
from trainer.data.records import Record, Turn
from trainer.errors import UserError
from trainer.models.features import write_features
from trainer.models.images import refuse_cropped_boxes
from trainer.models.loading import load_processor

ORIENTATIONS = range(1, 9)
QUESTION = Record("a", ("a.jpg",), (Turn("<image>\nWhat?", "no"),), ())


def photo(path: Path, orientation: int, width: int = 48, height: int = 32) -> Path:
    """Noise with a light corner, and the note of a camera that was held otherwise."""
    values = np.random.default_rng(0).integers(0, 100, (height, width, 3), dtype=np.uint8)
    values[: height // 2, : width // 2] += 150
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(path, exif=exif)
    return path


def late_exif(path: Path, orientation: int) -> Path:
    """A PNG with its EXIF behind the pixels, as the format allows."""
    photo(path, 1)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    content = content[:start] + content[start + 12 + length :]
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    end = content.index(b"IEND") - 4
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:end] + chunk + content[end:])
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("name", "write"), [*((f"a.{kind}", photo) for kind in ("jpg", "png", "webp", "tiff")), ("late.png", late_exif)]
)
def test_photos_are_upright_as_in_transformers(
    tmp_path: Path, name: str, write: Callable[[Path, int], Path], orientation: int
) -> None:
    path = write(tmp_path / name, orientation)
    wanted = load_image(str(path))
    found = open_image(path)
    assert (found.mode, found.size) == ("RGB", (32, 48) if orientation > 4 else (48, 32))
    assert (np.asarray(found) == np.asarray(wanted)).all()
    assert image_size(path) == wanted.size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_other_modes_are_as_in_transformers(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "I", "F") else "a.png")
    with Image.open(photo(tmp_path / "photo.png", 1)) as picture:
        picture.convert(mode).save(path)
    with Image.open(path) as picture:
        assert picture.mode == mode
    assert (np.asarray(open_image(path)) == np.asarray(load_image(str(path)))).all()


@pytest.mark.parametrize(("name", "order"), [("a.png", "<u2"), ("a.tiff", "<u2"), ("big.tiff", ">u2")])
def test_16_bits_are_the_same_picture_as_8(tmp_path: Path, name: str, order: str) -> None:
    """65535 is as white as 255; Pillow's conversion has all above 255 white."""
    eight = np.arange(256, dtype=np.uint8).reshape(8, 32)
    off = np.random.default_rng(0).integers(-128, 129, eight.shape)  # less than half a step of 8 bits
    sixteen = np.clip(eight.astype(int) * 257 + off, 0, 65535).astype(order)
    Image.fromarray(sixteen).save(tmp_path / name)
    assert (np.asarray(open_image(tmp_path / name)) == eight[..., None]).all()
    assert image_size(tmp_path / name) == (32, 8)


def as_is(picture: Image.Image) -> Image.Image:
    return picture


def clear(picture: Image.Image) -> Image.Image:
    picture.putpixel((3, 2), (1, 2, 3, 200))
    return picture


@pytest.mark.parametrize(
    ("mode", "change", "wanted"),
    [
        ("RGB", as_is, None),
        ("L", as_is, None),
        ("RGBA", as_is, None),  # opaque
        ("RGBA", clear, "has transparent pixels, seen in the colour that they hide; flatten it onto a background"),
        ("F", as_is, None),  # 0 to 255
        (
            "F",
            lambda picture: picture.point(lambda value: value / 255),
            "has values from 0 to 1, taken with 0 as ",
        ),
        (
            "I",
            lambda picture: picture.point(lambda value: value * 256),
            "has values from 0 to 65280, taken with 0 as",
        ),
        ("I;16", as_is, None),
        ("RGB", lambda picture: picture.resize((60, 34)), "has 60 x 34 pixels, decoded anew each time; scale it down"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_odd_in_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, change: Callable[[Any], Any], wanted: str | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    grey = Image.frombytes("L", (16, 16), bytes(range(256)))
    path = tmp_path / ("a.tiff" if mode in ("F", "I") else "a.png")
    change(grey.convert(mode)).save(path)
    found = oddity(path)
    assert found is None if wanted is None else (found or "").startswith(wanted)


def test_training_sees_the_upright_photo(pixel_model: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 6)
    processor = load_processor(str(pixel_model))
    encoded = ConversationEncoder(processor, 200).training_sample(QUESTION, tmp_path.joinpath)
    wanted = processor.image_processor(images=[load_image(str(tmp_path / "a.jpg"))], return_tensors="pt")
    assert torch.equal(encoded.image_inputs["pixel_values"], wanted["pixel_values"])


def test_cached_features_are_of_the_upright_photo(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 6)
    seen: list[np.ndarray] = []

    def processor(images: list[Image.Image], **_: Any) -> dict[str, torch.Tensor]:
        seen.extend(map(np.asarray, images))
        return {"pixel_values": torch.zeros(len(images), 3, 1, 1)}

    class Tower(torch.nn.Linear):
        def forward(self, pixels: torch.Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": torch.zeros(len(pixels), 1, 1)})

    write_features(tmp_path / "features", [tmp_path / "a.jpg"], Tower(1, 1), processor)
    assert (seen[0] == np.asarray(load_image(str(tmp_path / "a.jpg")))).all()


def test_tokens_are_counted_for_the_upright_photo(tmp_path: Path) -> None:
    """A model that tiles: 3 tiles by 1 are not 1 by 3, and marks stand between rows."""
    processor = FAMILIES["idefics3"]()[1]
    tokens = []
    for orientation in (1, 6):
        photo(tmp_path / "a.jpg", orientation, 300, 100)
        counter, encoder = token_counter(processor, 4096), ConversationEncoder(processor, 4096)
        counted, encoded = (one.training_sample(QUESTION, tmp_path.joinpath) for one in (counter, encoder))
        assert counted.labels == encoded.labels
        tokens.append(len(encoded.input_ids))
    assert tokens[0] != tokens[1]


def test_boxes_are_checked_on_the_upright_photo(pixel_model: Path, tmp_path: Path) -> None:
    processor = load_processor(str(pixel_model))
    own = processor.image_processor
    own.do_center_crop, own.size = True, {"shortest_edge": 64}
    with pytest.raises(UserError, match="has 32 x 48 pixels"):
        refuse_cropped_boxes(processor, [photo(tmp_path / "a.jpg", 6)], "x")
    own.do_center_crop = False  # the whole image is seen
    refuse_cropped_boxes(processor, [photo(tmp_path / "a.jpg", 6)], "x")


def test_pillows_own_warnings_are_not_printed(tmp_path: Path) -> None:
    """They are lines of Python that name no image; `cotbal check` names it."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (60, 40)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")
    code = (
        "import sys; from pathlib import Path; from PIL import Image; from trainer.data.pictures import open_image; "
        "Image.MAX_IMAGE_PIXELS = 2000; print(open_image(Path(sys.argv[1])).size)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(60, 40)\n", "")
