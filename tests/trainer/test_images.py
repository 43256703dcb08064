"""``model.images``: padding as LLaVA-1.5 pads, and boxes that a cropping processor would falsify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from trainer.config import parse_config
from trainer.data.converters.refcoco import box_text
from trainer.data.encoding import ConversationEncoder
from trainer.data.records import Record, Turn
from trainer.errors import UserError
from trainer.metrics import parse_box
from trainer.models.config import ImageConfig
from trainer.models.images import crops, pad_to_square, set_image_options
from trainer.models.loading import load_processor
from trainer.pipeline.preflight import check_config

SIZE = 48
MEAN, STD = (0.48, 0.455, 0.41), (0.27, 0.26, 0.28)
TRANSFORMS = {
    # As published: the shorter side is resized, the longer one cropped; here the crop is the smaller, as in CLIP-H.
    "clip": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": SIZE + 8}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD),
}


class Processor:
    """As much of a processor as carries an image processor."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def pixels(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(self.image_processor(images=[picture], return_tensors="np")["pixel_values"][0])


def expected(picture: Image.Image) -> np.ndarray:
    """LLaVA-1.5's transform in Pillow: onto a square of the mean's colour, in its middle, then resized."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in MEAN))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    values = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return ((values - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(width=st.integers(3, 130), height=st.integers(3, 130), seed=st.integers(0, 9))
def test_pads_as_llava_does(transform: str, width: int, height: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    processor = Processor(TRANSFORMS[transform]())
    pad_to_square(processor, "x")
    once = processor.pixels(picture)
    np.testing.assert_allclose(once, expected(picture), atol=1e-5)  # float32 of values up to 3
    pad_to_square(processor, "x")  # as on the folder of a model that was trained so
    assert (processor.pixels(picture) == once).all()


@pytest.mark.parametrize("size", [(120, 45), (37, 90)])
def test_boxes_of_the_converters_are_where_the_model_sees_them(size: tuple[int, int]) -> None:
    """A white rectangle in a black image; `cotbal convert refcoco` writes its box, to two decimals."""
    x, y, width, height = 11, 8, 21, 30
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (x, y, x + width, y + height))
    processor = Processor(TRANSFORMS["clip"]())
    pad_to_square(processor, "x")
    bright = processor.pixels(picture)[0] * STD[0] + MEAN[0] > 0.75  # more than the padding
    rows, columns = np.nonzero(bright)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    box = parse_box(box_text((x, y, width, height), *size, "pad"))
    assert box is not None
    assert np.abs(np.array(box) * SIZE - seen).max() <= 1.25  # a pixel of the model, and half of a hundredth
    other = parse_box(box_text((x, y, width, height), *size, "image"))
    assert other is not None
    assert np.abs(np.array(other) * SIZE - seen).max() > 5


def test_a_trained_model_keeps_it_and_loading_it_again_is_the_same(pixel_model: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))

    def pixels(processor: Any) -> np.ndarray:
        return np.asarray(processor.image_processor(images=[picture], return_tensors="np")["pixel_values"][0])

    processor = load_processor(str(pixel_model), ImageConfig(aspect_ratio="pad"))
    assert (pixels(processor) != pixels(load_processor(str(pixel_model), ImageConfig(aspect_ratio="own")))).any()
    processor.save_pretrained(tmp_path / "model")
    for images in (None, ImageConfig(aspect_ratio="pad"), ImageConfig(aspect_ratio="own")):
        assert (pixels(load_processor(str(tmp_path / "model"), images)) == pixels(processor)).all()


def test_a_text_model_has_no_images(pixel_model: Path) -> None:
    with pytest.raises(UserError, match="'some/model' reads text only"):
        pad_to_square(load_processor(str(pixel_model)).tokenizer, "some/model")


def test_models_with_ways_of_their_own() -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    with pytest.raises(UserError, match="LlavaNextImageProcessorPil, which treats shapes of images in its own way"):
        pad_to_square(Processor(LlavaNextImageProcessorPil()), "x")


def test_what_crops() -> None:
    clip, siglip = (Processor(make()) for make in TRANSFORMS.values())
    assert crops(clip)
    assert not crops(siglip)  # squeezed: all of the image, and boxes relative to it
    pad_to_square(clip, "x")
    assert not crops(clip)


@pytest.fixture
def cropping(run_data: dict[str, Any], pixel_model: Path, tmp_path: Path) -> dict[str, Any]:
    """The run's configuration on a model whose processor crops, with wide images in a copy of the data."""
    folder = tmp_path / "data"
    shutil.copytree(Path(run_data["tasks"][0]["image_root"]), folder)
    for task in run_data["tasks"]:
        task["image_root"] = str(folder)
        for split in ("train", "validation", "test"):
            task[split] = str(folder / Path(task[split]).name)
    for path in (folder / "images").glob("*_1.png"):
        Image.new("RGB", (90, 64)).save(path)
    model = tmp_path / "model"
    shutil.copytree(pixel_model, model)
    path = next(model.glob("*processor_config.json"))
    content = json.loads(path.read_text())
    own = content.get("image_processor", content)
    own |= {"do_center_crop": True, "size": {"shortest_edge": 64}}
    path.write_text(json.dumps(content))
    run_data["model"]["path"] = str(model)
    return run_data


def test_boxes_in_cropped_images_are_refused(cropping: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check_config(parse_config(cropping, "x"))
    text = str(caught.value)
    assert "task 'box': answers are boxes, image " in text
    assert "box_train_1.png has 90 x 64 pixels" in text
    assert "set model.images.aspect_ratio: pad" in text
    assert "'colour'" not in text  # its answers are words


def test_boxes_that_a_test_metric_asks_for_are_refused_too(cropping: dict[str, Any]) -> None:
    cropping["tasks"] = [cropping["tasks"][0] | {"test_metrics": ["exact_match", "accuracy_iou"]}]
    with pytest.raises(UserError, match="task 'colour': answers are boxes, image "):
        check_config(parse_config(cropping, "x"))


SHORTER, SQUARE = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size=SHORTER, crop_size=SQUARE),
        CLIPImageProcessorPil(size=SHORTER, crop_size=SQUARE, do_center_crop=False),
        CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE),
        LlavaImageProcessorPil(size=SHORTER, crop_size=SQUARE, do_pad=False),
        LlavaImageProcessorPil(size=SHORTER, crop_size=SQUARE, do_pad=True),
    ],
)
def test_what_a_processor_cuts_off_is_not_in_its_pixels(processor: Any) -> None:
    picture = Image.new("RGB", (2 * SIZE, SIZE))
    picture.paste("white", (0, 0, SIZE // 4, SIZE))
    seen = Processor(processor).pixels(picture).max() > 1  # black is below 0
    assert crops(Processor(processor)) == (not seen)


def test_a_text_model_cuts_no_images() -> None:
    assert not crops(object())


def square(data: dict[str, Any]) -> None:
    for path in (Path(data["tasks"][1]["image_root"]) / "images").glob("box_*.png"):
        Image.new("RGB", (64, 64)).save(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"].update(images={"aspect_ratio": "pad"}),
        lambda data: data["model"].update(images={"aspect_ratio": "own"}),
        lambda data: data["tasks"][1].update(metric="cider"),
        square,
    ],
)
def test_what_is_not_refused(cropping: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
    change(cropping)
    assert check_config(parse_config(cropping, "x"))


@pytest.mark.parametrize(
    ("family", "options", "wanted"),
    [
        # 300 x 200 pixels become at most 4096: 64 x 48, the multiples of 16 below; a token is 16 x 16 of them.
        ("qwen2_5_vl", {"max_pixels": 4096}, 4 * 3),
        ("internvl", {"max_patches": 1}, 4),  # one tile
        ("idefics3", {"do_image_splitting": False}, 4),
    ],
)
def test_settings_of_an_image_processor(family: str, options: dict[str, Any], wanted: int, tmp_path: Path) -> None:
    processor = FAMILIES[family]()[1]
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    record = Record("a", ("a.png",), (Turn("<image>\nWhat?", "no"),), ())
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    whole = ConversationEncoder(processor, 4096).training_sample(record, tmp_path.joinpath).input_ids.count(token)
    set_image_options(processor, options, "x")
    found = ConversationEncoder(processor, 4096).training_sample(record, tmp_path.joinpath).input_ids.count(token)
    assert (found, found < whole) == (wanted, True)


@pytest.mark.parametrize(
    ("family", "options"), [("gemma3", {"do_pan_and_scan": True}), ("internvl", {"crop_to_patches": False})]
)
def test_a_setting_that_the_processor_overrules(family: str, options: dict[str, Any]) -> None:
    """Refused, since it would change nothing: a wide image has as many tokens as without it."""
    processor = FAMILIES[family]()[1]
    (name, value), size = next(iter(options.items())), [(2000, 300)]
    with pytest.raises(UserError, match=rf"a {type(processor).__name__} sets {name} to {not value} whatever its image"):
        set_image_options(processor, options, "x")
    whole = ConversationEncoder(processor, 4096).blank_image(size).input_ids
    setattr(processor.image_processor, name, value)
    assert ConversationEncoder(processor, 4096).blank_image(size).input_ids == whole
    set_image_options(processor, {name: not value}, "x")


def test_a_setting_that_is_none(pixel_model: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown setting of CLIPImageProcessor(Pil)? .* 'do_cente_crop' \(did you mean 'do_c"
    ):
        load_processor(str(pixel_model), ImageConfig(options={"do_cente_crop": True}))
    with pytest.raises(
        UserError, match=r"model\.images\.options: CLIPImageProcessor(Pil)? does not take .*'size': 'large'"
    ):
        load_processor(str(pixel_model), ImageConfig(options={"size": "large"}))
    with pytest.raises(UserError, match=r"model\.images\.options: 'x' reads text only"):
        set_image_options(load_processor(str(pixel_model)).tokenizer, {"size": 3}, "x")


def test_a_run_depends_on_what_is_asked_of_the_processor_and_on_nothing_else() -> None:
    """None and "own" are one thing to it, so that a run made with one continues with the other."""
    options = {"max_pixels": 9}
    asked = [{"aspect_ratio": way, "options": own} for way in (None, "own", "pad") for own in ({}, options)]
    wanted = [{}, {"options": options}] * 2 + [{"aspect_ratio": "pad"}, {"aspect_ratio": "pad", "options": options}]
    assert [ImageConfig(**one).changes() for one in asked] == wanted  # type: ignore[arg-type]
