"""easy-VQA: the published questions and pictures, enlarged; test is the official test split."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from PIL import Image

from trainer.data.built_in.catalogue import Split, require_material
from trainer.data.built_in.drawing import SIDE
from trainer.data.built_in.material import easy_vqa_image, easy_vqa_questions
from trainer.data.built_in.samples import Exchange, Sample, generator

_VALIDATION_IMAGES = 500  # of the 4,000 official training images


def images_of(seed: int, split: Split) -> list[int]:
    """Numbers of the images of a split, in the order in which they are used up."""
    official = "test" if split == "test" else "train"
    images = sorted(easy_vqa_questions(official))
    generator(seed, "easy_vqa", official, "images").shuffle(images)
    if split == "validation":
        return images[:_VALIDATION_IMAGES]
    return images[_VALIDATION_IMAGES:] if split == "train" else images


def samples(seed: int, split: Split, count: int) -> Iterator[Sample]:
    """Training: at least enough images for ``count`` conversations. Else one question about each image."""
    official = "test" if split == "test" else "train"
    questions = easy_vqa_questions(official)
    images = images_of(seed, split)
    require_material("easy_vqa", split, count, len(images), "images")
    rng = generator(seed, "easy_vqa", split)
    for image in images[:count]:
        # the same words are asked twice about a few images: one of them is enough
        asked = [Exchange(q[0].upper() + q[1:], a) for q, a in dict.fromkeys(questions[image])]
        if split != "train":
            asked = [rng.choice(asked)]
        yield Sample(tuple(asked), partial(enlarged, official, image))


def enlarged(official: str, image: int) -> Image.Image:
    with Image.open(easy_vqa_image(official, image)) as picture:
        return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
