"""Small random models of the families of LMMs that people fine-tune, with processors as their hubs have them.

Processors use Pillow, and videos are left out: torchvision, which transformers asks for then, is not among the tests'
packages.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import transformers
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from trainer.models.tiny_llava import train_tokenizer

TEXTS = ["How much is 2 plus one? It is 3. What colour is it? red green user assistant model A long answer."] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else message['role']) + '\n' }}{% for part in message['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)
SIDE = 32  # pixels of a tile, 4 x 4 patches
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
    "image_size": SIDE,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
Made = tuple[Any, Any]  # configuration, processor


def make_tokenizer(special: list[str], named: dict[str, str], bos: str | None = None) -> PreTrainedTokenizerFast:
    backend = train_tokenizer(TEXTS, 420).backend_tokenizer
    tokens = [*special, *named.values(), *([bos] if bos else [])]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    options: dict[str, Any] = {"eos_token": "<|im_end|>" if "<|im_end|>" in special else "</s>"}
    if bos:
        start = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=start)
        options["bos_token"] = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", extra_special_tokens=named, padding_side="left", **options
    )


def _text(tokenizer: Any, kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, **options,
    )  # fmt: skip


def make_image_processor(module: str, name: str, **options: Any) -> Any:
    return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)(**options)


def _processor(kind: str, *arguments: Any, **options: Any) -> Any:
    own = ProcessorMixin.check_argument_for_proper_class

    def all_but_videos(self: Any, name: str, argument: Any) -> Any:
        return None if "video" in name else own(self, name, argument)

    with patch.object(ProcessorMixin, "check_argument_for_proper_class", all_but_videos):
        return getattr(transformers, kind)(*arguments, **options)


def _qwen(version: str, text: dict[str, Any], vision: dict[str, Any]) -> Made:
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    marks = ["<|vision_start|>", "<|vision_end|>"]
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>", *marks], named)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]} | text.pop("rope", {})
    language = _text(tokenizer, f"{version}TextConfig", rope_parameters=rope, **text)
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                   tokenizer.convert_tokens_to_ids([*named.values(), *marks]), strict=True))  # fmt: skip
    config = getattr(transformers, f"{version}Config")(
        text_config=language.to_dict(), vision_config=QWEN_VISION | vision, **ids
    )
    images = make_image_processor(
        "qwen2_vl", "Qwen2VLImageProcessorPil", size={"shortest_edge": 1024, "longest_edge": 16384}, patch_size=8,
        merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return config, _processor(f"{version}Processor", images, tokenizer, None, chat_template=template)


def qwen2_5_vl() -> Made:
    vision = {"intermediate_size": 64, "out_hidden_size": 32, "window_size": SIDE, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", {}, vision)


def qwen3_vl() -> Made:
    vision = {
        "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen("Qwen3VL", {"head_dim": 8, "rope": {"mrope_interleaved": True}}, vision)


def ernie4_5_vl() -> Made:
    """A mixture of experts that is told two types of each token: images and text have experts of their own."""
    named = {
        f"{kind}{part}_token": f"<|{(kind + (part or '_placeholder')).upper()}|>"
        for kind in ("image", "video") for part in ("", "_start", "_end")
    }  # fmt: skip
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"], named)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    language = _text(
        tokenizer, "Ernie4_5_VLMoeTextConfig", rope_parameters=rope, moe_intermediate_size=[32, 16], moe_k=2,
        moe_num_experts=4, moe_num_shared_experts=1, mlp_layer_types=["sparse", "dense"],
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2,
        "intermediate_size": 64, "temporal_merge_size": 2,
    }  # fmt: skip
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=language, vision_config=vision, **ids)
    images = make_image_processor(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil", size={"shortest_edge": 1024, "longest_edge": 16384},
        patch_size=8, merge_size=2,
    )  # fmt: skip
    template = CHATML.replace("IMAGE", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    return config, _processor("Ernie4_5_VLMoeProcessor", images, tokenizer, None, chat_template=template)


def gemma3() -> Made:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(["<start_of_turn>", "<end_of_turn>"], named, bos="<bos>")
    layers = ["sliding_attention", "full_attention"]
    text = _text(
        tokenizer, "Gemma3TextConfig", head_dim=8, sliding_window=24, layer_types=layers, query_pre_attn_scalar=8
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    images = make_image_processor("gemma3", "Gemma3ImageProcessorPil", size={"height": SIDE, "width": SIDE})
    return config, _processor("Gemma3Processor", images, tokenizer, chat_template=GEMMA, image_seq_length=4)


def llava_next() -> Made:
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"], {"image_token": "<image>"})
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=_text(tokenizer, "LlamaConfig"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    images = make_image_processor(
        "llava_next", "LlavaNextImageProcessorPil", size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return config, _processor(
        "LlavaNextProcessor", images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )  # fmt: skip


def llava_onevision() -> Made:
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"], named)
    strategy = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=_text(tokenizer, "Qwen2Config"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        **strategy,
    )
    images = make_image_processor(
        "llava_onevision", "LlavaOnevisionImageProcessorPil", size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return config, _processor(
        "LlavaOnevisionProcessor", images, tokenizer, None, num_image_tokens=16,
        chat_template=CHATML.replace("IMAGE", "<image>\n"), **strategy,
    )  # fmt: skip


def internvl() -> Made:
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"], named)
    config = transformers.InternVLConfig(
        vision_config=VISION | {"patch_size": [8, 8], "image_size": [SIDE, SIDE]},
        text_config=_text(tokenizer, "Qwen2Config"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = make_image_processor(
        "got_ocr2", "GotOcr2ImageProcessorPil", size={"height": SIDE, "width": SIDE}, crop_to_patches=True,
        min_patches=1, max_patches=6,
    )  # fmt: skip
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return config, _processor("InternVLProcessor", images, tokenizer, None, image_seq_length=4, chat_template=template)


def idefics3() -> Made:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>", *tiles]
    tokenizer = make_tokenizer(special, {"image_token": "<image>"})
    images = make_image_processor(
        "idefics3", "Idefics3ImageProcessorPil", size={"longest_edge": 96}, max_image_size={"longest_edge": SIDE}
    )
    template = CHATML.replace("IMAGE", "<image>")
    processor = _processor("Idefics3Processor", images, tokenizer, image_seq_len=4, chat_template=template)
    tokenizer = processor.tokenizer
    config = transformers.Idefics3Config(
        vision_config=VISION,
        text_config=_text(tokenizer, "LlamaConfig").to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return config, processor


FAMILIES: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (qwen2_5_vl, qwen3_vl, ernie4_5_vl, gemma3, llava_next, llava_onevision, internvl, idefics3)
}


def make(family: str) -> tuple[Any, Any]:
    """A model in float64, whose parameters are large enough for outputs to differ, and its processor."""
    config, processor = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForImageTextToText.from_config(config, experts_implementation="eager")
        model = made.double().eval()  # other implementations of experts are not for float64
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor
