"""Model folders whose files do not hold the weights of their config.json, beside what transformers itself loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.models.loading import load_config, load_model, load_processor
from trainer.models.weights import check_weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
FIRST = "model-00001-of-00006.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six shards."""
    folder = tmp_path_factory.mktemp("weights") / "whole"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def check(folder: Path) -> None:
    check_weights(folder, load_config(str(folder)), LlamaForCausalLM)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_file(folder: Path, name: str) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    for file in folder.glob("model*"):
        file.unlink()
    if name.endswith(".bin"):
        torch.save(model.state_dict(), folder / name)
    else:
        model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["shards", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_folders(folder: Path, name: str, tied: bool) -> None:
    """With one file or several, and with a head that is the embedding, whether a file has it or not."""
    configure(folder, tie_word_embeddings=tied)
    if name != "shards":
        one_file(folder, name)
    check(folder)
    load_model(str(folder), ModelConfig(path=str(folder), freeze=[]), torch.float32)


def misnamed(folder: Path) -> None:
    one_file(folder, "pytorch_model.bin")
    weights = torch.load(folder / "pytorch_model.bin")
    weights["head.weight"] = weights.pop("lm_head.weight")
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [misnamed, lambda folder: configure(folder, num_hidden_layers=3, layer_types=None)])
def test_weights_that_would_start_from_random_values(folder: Path, damage: Callable[[Path], None]) -> None:
    """Exactly those that transformers reports while it loads, and goes on with; beforehand and in the training."""
    damage(folder)
    _, told = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    missing = sorted(told["missing_keys"])
    assert len(missing) in (1, 9)
    more = f", {len(missing) - 3} more" if len(missing) > 3 else ""
    message = f"no weights for {', '.join(missing[:3])}{more}, which would start from random values"
    for look in (check, lambda folder: load_model(str(folder), ModelConfig(path="x", freeze=[]), torch.float32)):
        with pytest.raises(UserError) as caught:
            look(folder)
        assert message in str(caught.value)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(FIRST), rf"model lacks {FIRST}, of 6 files that its model\.safetensors\.index\.json names"),
        (cut, rf"{FIRST} cannot be read: .*; copy or download the file again"),
        (write(FIRST, POINTER), rf"{FIRST}: only Git LFS's pointer is there, not the file; fetch it with"),
        (remove("model.safetensors.index.json"), "it has no weights, neither model.safetensors nor pytorch_model.bin"),
        (write("model.safetensors.index.json", "{"), "index.json is no index of weights"),
        (write("model.safetensors", ""), "model.safetensors cannot be read"),
        (
            lambda folder: configure(folder, vocab_size=70),
            r"other shapes than its config\.json says: lm_head\.weight \[64, 32\] for \[70, 32\], model\.embed_tokens",
        ),
    ],
)  # fmt: skip
def test_damaged_folders(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        check(folder)


def test_nothing_is_read_but_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of any size: weights that nobody can allocate are found whole."""
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 2**36
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    monkeypatch.setattr(
        "trainer.models.weights._empty",
        lambda file: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
    )
    check_weights(folder, config, LlamaForCausalLM)


def test_a_processor_that_is_a_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)
    with pytest.raises(UserError, match=r"tokenizer\.json: only Git LFS's pointer is there"):
        load_processor(str(folder))


@pytest.mark.parametrize("load", [load_config, load_processor])
def test_code_that_comes_with_a_model_is_not_run(
    folder: Path, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks for it at a terminal; for types that it has it takes its own code."""
    (folder / "own.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    configure(folder, auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    assert load_config(str(folder)).model_type == "llama"
    configure(folder, model_type="internvl_chat")
    with pytest.raises(UserError, match=r"no model of type 'internvl_chat', and code that .* is not run here; take"):
        load(str(folder))


def test_a_model_of_another_code_base(folder: Path) -> None:
    """LLaVA's own checkpoints say that they are of type llava, and have a tokenizer alone."""
    with pytest.raises(UserError, match="the folder needs its tokenizer's and processor's files"):
        load_processor(str(folder))
    configure(folder, architectures=["LlavaLlamaForCausalLM"], model_type="llava")
    with pytest.raises(UserError, match="; LlavaLlamaForCausalLM is no class of transformers: take the model in"):
        load_processor(str(folder))


def test_an_adapter_is_no_model(folder: Path) -> None:
    """Beside the weights, transformers would load it into them."""
    (folder / "adapter_config.json").write_text("{}")
    for load in (load_config, load_processor):
        with pytest.raises(UserError, match="it holds an adapter of PEFT, which is trained with its model; merge them"):
            load(str(folder))
