"""The built-in model: a stock ``LlavaForConditionalGeneration`` small enough for two CPU cores.

A frozen EfficientNet-Lite0, LLaVA's two-layer projector and a Llama of a few layers with random weights, with a
byte-level BPE tokenizer made from the built-in tasks' training text. It is written as an ordinary model folder,
so that everything after it loads the built-in model and a downloaded one in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.config import TinyLlavaConfig
from trainer.data.records import IMAGE_PLACEHOLDER
from trainer.models.efficientnet_lite import IMAGE_MEAN, IMAGE_STD, STRIDE, load_pretrained_tower

PAD, END, USER, ASSISTANT = "<pad>", "</s>", "<|user|>", "<|assistant|>"
# The blank before each text makes its first word the same token as within a sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
# Coordinates are spelled digit by digit: the first one says roughly where, which a small model learns first.
_PIECES = Regex(r"0\.|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with LLaVA's special tokens; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, USER, ASSISTANT, IMAGE_PLACEHOLDER]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE_PLACEHOLDER, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="left",
    )


def write_tiny_llava(
    directory: Path, texts: Iterable[str], config: TinyLlavaConfig, *, image_size: int, max_length: int, seed: int
) -> None:
    """Writes the built-in model as a model folder: weights, tokenizer, processor and chat template.

    Args:
        directory: the folder to write.
        texts: training text that the tokenizer's merges come from.
        image_size: side of the square images in pixels, a multiple of 32.
        max_length: number of positions of the language model.
        seed: of the random weights.
    """
    tokenizer = train_tokenizer(texts, config.vocabulary)
    tower = load_pretrained_tower(image_size)
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=max_length,
        initializer_range=config.hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    llava_config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=int(tokenizer.vocab[IMAGE_PLACEHOLDER]),
        image_seq_length=(image_size // STRIDE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(llava_config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    side = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=side, do_center_crop=False, crop_size=side, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
        ),
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)
