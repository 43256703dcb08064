"""What a model sees of an image that is not square: LLaVA-1.5 pads it, its processor as published crops it.

A cropped image has lost what was at its longer sides, and boxes relative to the image, or to the padded square, are
wrong in what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.pictures import image_size
from trainer.errors import UserError, unknown_name

_KEPT = (
    "do_convert_rgb", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std",
)  # fmt: skip
_CHANNELS = ("num_channels", "in_channels", "in_chans")


def set_image_options(processor: Any, options: Mapping[str, Any], path: str) -> None:
    """Changes settings of a processor's image processor, such as the most pixels or tiles of an image.

    Args:
        processor: of the model.
        options: values by name.
        path: of the model, for errors.

    Raises:
        UserError: the model reads no images, its image processor has no such setting, or not with this value, or the
            processor sets it to another in every call.
    """
    own = getattr(processor, "image_processor", None)
    if own is None:
        raise UserError(f"model.images.options: '{path}' reads text only; leave them out")
    known = sorted(type(own).valid_kwargs.__annotations__)
    for name in options:
        if name not in known:
            raise unknown_name(f"setting of {type(own).__name__} in model.images.options:", name, known)
        if name in (fixed := _set_in_every_call(processor)) and fixed[name] != options[name]:
            raise UserError(
                f"model.images.options: a {type(processor).__name__} sets {name} to {fixed[name]} whatever its image "
                f"processor says, so {options[name]} would change nothing; leave it out"
            )
    try:
        processor.image_processor = type(own).from_dict(own.to_dict(), **options)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"model.images.options: {type(own).__name__} does not take {dict(options)}: {error}") from error


def _set_in_every_call(processor: Any) -> dict[str, Any]:
    """Settings that a processor hands to its image processor, which go before that one's own."""
    older = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    return {**older.get("images_kwargs", {}), **(getattr(processor, "images_kwargs", None) or {})}


def pad_to_square(processor: Any, path: str) -> None:
    """Makes a processor pad every image to a square with the colour of its mean, the image in the middle.

    That is ``image_aspect_ratio pad`` of LLaVA-1.5 (Liu et al., 2023a). The processor is saved so, with a trained
    model too.

    Args:
        processor: of a model that takes square images: CLIP's or SigLIP's transform, or LLaVA's own.
        path: of the model, for errors.

    Raises:
        UserError: the model reads no images, or treats their shapes in a way of its own.
    """
    own = getattr(processor, "image_processor", None)
    if own is None:
        raise UserError(f"model.images.aspect_ratio: '{path}' reads text only; leave the option out")
    family = type(own).__name__.removesuffix("Fast").removesuffix("Pil")
    if family not in ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"):
        raise UserError(
            f"model.images.aspect_ratio: '{path}' has a {type(own).__name__}, which treats shapes of images in its own "
            "way; 'pad' is for models that take square images (CLIP's, SigLIP's or LLaVA's processor); leave it out"
        )
    # Nothing is left to crop: what the crop would leave is the size to come to.
    size = own.crop_size if getattr(own, "do_center_crop", None) else own.size
    kept = {name: getattr(own, name) for name in _KEPT}
    processor.image_processor = _llavas(own)(**kept, size=dict(size), do_center_crop=False, do_pad=True)


def _llavas(own: Any) -> Any:
    """LLaVA's image processor, with Pillow or with torchvision as the model's `own` one is."""
    if any(base.__name__ == "PilBackend" for base in type(own).__mro__):
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return LlavaImageProcessorPil
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    return LlavaImageProcessor


def crops(processor: Any) -> bool:
    """Whether the processor cuts off the longer sides of an image that is not square."""
    own = getattr(processor, "image_processor", None)
    fits = getattr(own, "do_pad", None) or not getattr(own, "do_center_crop", None)
    return not fits and "shortest_edge" in (getattr(own, "size", None) or {})


def refuse_cropped_boxes(processor: Any, images: Iterable[Path], title: str) -> None:
    """Raise where answers are boxes in images that the processor crops.

    Args:
        processor: of the model.
        images: files; the first that is not square decides.
        title: of the task, for the error.

    Raises:
        UserError: an image is not square, and the processor crops.
    """
    if not crops(processor):
        return
    for path in images:
        try:
            width, height = image_size(path)
        except Exception:  # whatever Pillow's plugins stumble over, another check's to report
            continue
        if width != height:
            raise UserError(
                f"{title}: answers are boxes, image {path} has {width} x {height} pixels, and the model's processor "
                "crops to the square in its middle, where no box is right; set model.images.aspect_ratio: pad (boxes "
                "relative to the padded square, as `cotbal convert` writes them), or 'own' to crop all the same"
            )


class VisionInput(NamedTuple):
    """What an image encoder reads, as numbers: pixels times channels."""

    patch: int  # of a patch, its token; 0 for a text model
    image: int  # of an image, where all have one size; else 0


def vision_input(config: Any) -> VisionInput:
    """Of a transformers configuration."""
    vision = getattr(config, "vision_config", None)
    patch = _area(getattr(vision, "patch_size", None))
    channels = next((found for name in _CHANNELS if (found := getattr(vision, name, None))), 3)
    image = _area(getattr(vision, "image_size", None)) * channels if patch else 0
    return VisionInput(patch * channels * (getattr(vision, "temporal_patch_size", None) or 1), image)


def _area(size: Any) -> int:
    """Of a square by its side, or of a rectangle by both; 0 for neither."""
    sides = [size, size] if isinstance(size, int) else size
    return sides[0] * sides[1] if isinstance(sides, (list, tuple)) and len(sides) == 2 else 0
