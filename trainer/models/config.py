"""The parts of the configuration about the model: where it comes from, what of it is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.options import MOST_EPOCHS, Options

BUILT_IN = "built_in"


class TinyLlavaConfig(Options):
    """Size of the built-in LLaVA (only read when ``model.path`` is ``built_in``)."""

    hidden_size: Annotated[int, Field(ge=16)] = 192
    layers: Annotated[int, Field(ge=1)] = 3
    heads: Annotated[int, Field(ge=1)] = 4
    vocabulary: Annotated[int, Field(ge=300)] = 3000
    pretraining_records: Annotated[int, Field(ge=0)] = Field(
        2400, description="image descriptions to pretrain on before Algorithm 1; 0 starts it from random weights"
    )
    pretraining_epochs: Annotated[float, Field(gt=0, le=MOST_EPOCHS)] = 4.0


class ImageConfig(Options):
    """What the model's processor makes of images; the models that come out keep it in their own processor."""

    aspect_ratio: Literal["pad", "own"] | None = Field(
        None,
        description="pad: images are padded to squares, as LLaVA-1.5 was trained; none and own: what the processor "
        "does, though with none a task of boxes is refused where that crops",
    )
    options: dict[str, Any] = Field(
        {}, description="settings of its image processor, e.g. `{max_pixels: 401408}` for Qwen-VL; the others stay"
    )

    def changes(self) -> dict[str, Any]:
        """What is asked for; empty where the processor is taken as it is."""
        given: dict[str, Any] = {"aspect_ratio": "pad"} if self.aspect_ratio == "pad" else {}
        return given | ({"options": self.options} if self.options else {})


class LoraConfig(Options):
    """LoRA (Hu et al., 2021): low-rank updates are trained beside frozen weights, and merged into the saved model."""

    rank: Annotated[int, Field(ge=1)] = Field(128, description="r, the rank of an update")
    alpha: Annotated[float, Field(gt=0)] = Field(256.0, description="an update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="on the input of an update, in training")
    target_modules: Annotated[list[str], Field(min_length=1)] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="last parts of the names of linear layers to adapt; not what `model.freeze` names",
    )
    train_whole: list[str] = Field(
        [], description="parameters whose name contains one of these are trained themselves, e.g. multi_modal_projector"
    )


class ModelConfig(Options):
    """The pretrained LMM that Algorithm 1 starts every training from."""

    path: str = Field(
        BUILT_IN,
        description="a transformers image-text-to-text or text model: folder, hub name (NAME or NAME@REVISION), or "
        "built_in",
    )
    tiny_llava: TinyLlavaConfig = TinyLlavaConfig()
    max_length: Annotated[int, Field(ge=16)] = Field(
        2048, description="tokens of a sequence at most; for longer samples see training.overlong"
    )
    freeze: list[str] = Field(["vision_tower"], description="parameters whose name contains one of these are frozen")
    images: ImageConfig = ImageConfig()
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="none: the model's own choice"
    )
    lora: LoraConfig | None = Field(None, description="train low-rank updates only, see model.lora; none: everything")
