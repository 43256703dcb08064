"""Tiny random transformers models of many architectures, from configs, with a batch for each.

Shapes: B = 3 sequences of S = 14 tokens with ragged labels, vocabulary 97 (more than one tile of most kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 97
IMAGE, VIDEO, START, END = 90, 91, 92, 93  # special tokens of the image-text models; text is below 80
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


def _text(name: str, **changes: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        config = getattr(hf, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**TEXT | changes | more)
        return getattr(hf, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)

    return make


def _image_text(model: str, config: str, text: Any, vision: Any, **changes: Any) -> Callable[..., nn.Module]:
    """`text` and `vision` are (config class, keys)."""

    def make(tie_word_embeddings: bool = False, **more: Any) -> nn.Module:
        text_class, text_keys = text
        vision_class, vision_keys = vision
        whole = getattr(hf, config)(
            text_config=getattr(hf, text_class)(**text_keys | {"tie_word_embeddings": tie_word_embeddings} | more),
            vision_config=getattr(hf, vision_class)(**vision_keys),
            tie_word_embeddings=tie_word_embeddings,
            **changes,
        )
        return getattr(hf, model)(whole)

    return make


_CLIP = ("CLIPVisionConfig", VISION)
_SIGLIP = ("SiglipVisionConfig", VISION)
_LLAMA = ("LlamaConfig", TEXT)
_QWEN_VL = TEXT | {"rope_parameters": MROPE}

TEXT_MODELS: dict[str, Callable[..., nn.Module]] = {
    "llama": _text("Llama"),
    "mistral": _text("Mistral", sliding_window=6),
    "qwen2": _text("Qwen2"),
    "qwen3": _text("Qwen3", head_dim=8),
    "gemma": _text("Gemma", head_dim=8),
    "gemma2": _text("Gemma2", head_dim=8, final_logit_softcapping=0.5, sliding_window=6),
    "gemma3_text": _text("Gemma3", head_dim=8, final_logit_softcapping=0.7, sliding_window=6),
    "phi3": _text("Phi3"),
    "olmo2": _text("Olmo2"),
    "granite": _text("Granite", logits_scaling=0.125),
    "granitemoe": _text("GraniteMoe", logits_scaling=0.125, **MOE),
    "cohere": _text("Cohere", logit_scale=7.0),
    "cohere2": _text("Cohere2", logit_scale=0.0625, head_dim=8, sliding_window=6),
    "starcoder2": _text("Starcoder2"),
    "stablelm": _text("StableLm"),
    "gpt_neox": _text("GPTNeoX"),
    "gpt2": _text("GPT2", n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64),
    "gptj": _text("GPTJ", n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, rotary_dim=4),
    "mixtral": _text("Mixtral", **MOE),
    "falcon_h1": _text("FalconH1", lm_head_multiplier=3.0, **MAMBA),
    "recurrent_gemma": _text("RecurrentGemma", logits_soft_cap=0.5, block_types=("recurrent", "attention")),
}
IMAGE_TEXT_MODELS: dict[str, Callable[..., nn.Module]] = {
    "llava": _image_text("LlavaForConditionalGeneration", "LlavaConfig", _LLAMA, _CLIP, image_token_index=IMAGE),
    "llava_onevision": _image_text(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        ("Qwen2Config", TEXT),
        _SIGLIP,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
    ),
    "qwen2_vl": _image_text(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        ("Qwen2VLTextConfig", _QWEN_VL),
        ("Qwen2VLVisionConfig", QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        **QWEN_TOKENS,
    ),
    "qwen2_5_vl": _image_text(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        ("Qwen2_5_VLTextConfig", _QWEN_VL),
        (
            "Qwen2_5_VLVisionConfig",
            QWEN_VISION
            | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
            | {"fullatt_block_indexes": [1], "window_size": 16},
        ),
        **QWEN_TOKENS,
    ),
    "paligemma": _image_text(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        ("Gemma2Config", TEXT | {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 6}),
        ("SiglipVisionConfig", VISION | {"projection_dim": 32}),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    "idefics3": _image_text(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        _LLAMA,
        ("Idefics3VisionConfig", VISION),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    "smolvlm": _image_text(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        _LLAMA,
        ("SmolVLMVisionConfig", VISION),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    "internvl": _image_text(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        ("Qwen2Config", TEXT),
        ("InternVLVisionConfig", VISION | {"image_size": [16, 16], "patch_size": [8, 8]}),
        image_token_id=IMAGE,
        image_seq_length=1,
        downsample_ratio=0.5,
    ),
    "gemma3": _image_text(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        ("Gemma3TextConfig", TEXT | {"head_dim": 8, "sliding_window": 6}),
        _SIGLIP,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    ),
    "aya_vision": _image_text(
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        ("Cohere2Config", TEXT | {"head_dim": 8, "logit_scale": 0.0625, "sliding_window": 6}),
        _SIGLIP,
        image_token_index=IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    ),
}
MODELS = TEXT_MODELS | IMAGE_TEXT_MODELS
_ONE_TOKEN = ("idefics3", "smolvlm", "internvl", "aya_vision")  # pixel shuffle makes one token of four patches


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: these models are too small for two threads, which wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, **changes: Any) -> nn.Module:
    """The model in evaluation mode (no dropout), with weights large enough that scales and caps show."""
    torch.manual_seed(0)
    model = MODELS[kind](**changes).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(4)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch_for(kind: str) -> dict[str, Tensor]:
    """Input ids, attention mask and, for an image-text model, one image per sequence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (3, 14), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 11:] = 0
    if kind not in IMAGE_TEXT_MODELS:
        return batch
    tokens = 1 if kind in _ONE_TOKEN else 4
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    if kind == "llava_onevision":
        tokens = 5  # and one newline
        batch["image_sizes"] = torch.full((3, 2), 16)
        batch["pixel_values"] = torch.stack([pixels, pixels.flip(0)], dim=1)
        tokens = 4 + 6
    elif kind.startswith("qwen"):
        batch["pixel_values"] = torch.randn(3 * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 3)
    elif kind in ("idefics3", "smolvlm"):
        batch["pixel_values"] = pixels[:, None]
    else:
        batch["pixel_values"] = pixels
    ids[:, 1 : 1 + tokens] = IMAGE
    if kind.startswith("qwen"):
        ids[:, 0], ids[:, 5] = START, END
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if kind in ("gemma3", "paligemma"):
        batch["token_type_ids"] = (ids == IMAGE).long() if kind == "gemma3" else (labels_for(batch) != -100).long()
    return batch


def labels_for(batch: dict[str, Tensor]) -> Tensor:
    """Ragged: each sequence is supervised from another position on, the second is padded."""
    labels = batch["input_ids"].clone()
    for row, start in enumerate((6, 7, 11)):
        labels[row, :start] = -100
    labels[1, 11:] = -100
    return labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one; frees them on the model."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest gradient of each parameter, or of the model where it is much smaller than that."""
    assert a.keys() == b.keys()
    assert b
    # Parameters whose gradient is tiny share the scale of the largest gradient: it is where rounding comes from.
    largest = max(float(g.abs().max()) for g in b.values())
    for name, wanted in b.items():
        scale = max(float(wanted.abs().max()), 0.05 * largest)
        assert float((a[name] - wanted).abs().max()) <= tolerance * scale, name
