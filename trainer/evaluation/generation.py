"""One batch through the model: greedy answers to prompts, or losses of the answers that are there.

Legend: B records, S tokens of the longest, N generated tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from trainer.data.collator import pad, stack_images
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder, Encoded, padding_token
from trainer.data.records import Record
from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSet


@dataclass(frozen=True)
class Scored:
    """Results of a batch in its order, and how many tokens the model generated for it."""

    results: list[dict[str, Any]]
    generated_tokens: int


def encode(encoder: ConversationEncoder, chosen: EvaluationSet, records: Sequence[Record]) -> list[Encoded]:
    """Prompts, or whole conversations for perplexity.

    Raises:
        UserError: an image that does not decode, or a record that cannot be encoded, or that is too long with its
            answer for the model, named with its set.
    """
    encoded = []
    for record in records:
        try:
            one = (encoder.training_sample if chosen.teacher_forced else encoder.prompt)(record, chosen.image_path)
        except UserError as error:
            raise UserError(f"{chosen.title}: {error}") from error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            images = ", ".join(str(chosen.image_path(image)) for image in record.images)
            raise UserError(f"{chosen.title}, record '{record.id}': {images} cannot be decoded ({error})") from error
        # The last token that is generated is not read.
        if not chosen.teacher_forced and len(one.input_ids) + chosen.max_new_tokens - 1 > (encoder.table or math.inf):
            raise UserError(
                f"{chosen.title}: record '{record.id}': its prompt of {len(one.input_ids)} tokens and up to "
                f"{chosen.max_new_tokens} new ones are more than the {encoder.table} positions that the model has; "
                "lower max_new_tokens, or take the record out"
            )
        encoded.append(one)
    return encoded


class BatchScorer:
    """Runs batches on one device.

    Args:
        model: on its device, whole: not inside a ZeRO-3 engine, where every forward is a collective and ranks that
            generate different numbers of tokens wait for each other for ever.
        tokenizer: of the model.
        batch_size: most records of a batch.
        gap: blanks that the model writes between a prompt and its answer, which are no part of it.

    Raises:
        UserError: the model's parameters are spread over ranks.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, gap: str = "") -> None:
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise UserError(
                "this model is inside a ZeRO-3 engine, where generation hangs as soon as ranks differ in length; "
                "save it (trainer.save_model) and evaluate the folder: cotbal evaluate FOLDER"
            )
        self.model = model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)  # decodes here while another thread encodes with the original
        self.batch_size = batch_size
        self.gap = gap
        self._patched = False

    def __call__(self, chosen: EvaluationSet, encoded: Sequence[Encoded]) -> Scored:
        """Greedy answers, or summed losses when the set is teacher-forced.

        Raises:
            UserError: the device has too little memory for the batch.
        """
        try:
            with torch.inference_mode():
                return self._losses(encoded) if chosen.teacher_forced else self._answers(encoded, chosen.max_new_tokens)
        except torch.cuda.OutOfMemoryError as error:
            longest = max(len(one.input_ids) for one in encoded)
            more = "" if chosen.teacher_forced else f" and up to {chosen.max_new_tokens} new ones each"
            raise UserError(
                f"{chosen.title}: out of GPU memory with {len(encoded)} records at once, the longest of "
                f"{longest} tokens{more}; lower evaluation.batch_size (--batch-size), now {self.batch_size}"
            ) from error

    def _answers(self, encoded: Sequence[Encoded], max_new_tokens: int) -> Scored:
        text = self._text(encoded, "left")  # generation goes on at the right end
        generated_BN = self.model.generate(  # type: ignore[operator]  # any transformers model that generates
            **text,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding_token(self.tokenizer),
            **self._images(encoded),
        )[:, text["input_ids"].shape[1] :].cpu()
        texts = self._decoded(text["input_ids"][:, -1].tolist(), generated_BN.tolist())
        return Scored([{"prediction": own.removeprefix(self.gap)} for own in texts], self._until_end(generated_BN))

    def _decoded(self, last: Sequence[int], generated: Sequence[list[int]]) -> list[str]:
        """Texts that go on after prompts, of which `last` are the last tokens.

        Decoders of SentencePiece's kind take a blank off the beginning of a text, so a word is put before it.
        """
        words = {token: [] if self._begins_anew(token) else self._ids("a") for token in set(last)}
        rows = [[*words[token], *row] for token, row in zip(last, generated, strict=True)]
        starts = self._texts([words[token] for token in last])
        return [text.removeprefix(start) for text, start in zip(self._texts(rows), starts, strict=True)]

    def _begins_anew(self, token: int) -> bool:
        """Whether the token is a special one behind which the tokenizer writes the blank of the beginning of a text."""
        (seen,), (skipped,) = self._texts([[token]], special=True), self._texts([[token]])
        word = self._ids("a")
        return bool(seen and not skipped) and self._ids(f"{seen}a")[-len(word) :] == word

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _texts(self, rows: Sequence[list[int]], special: bool = False) -> list[str]:
        # Not cleaned up: "a , b" stays what it is.
        return self.tokenizer.batch_decode(rows, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _until_end(self, generated_BN: Tensor) -> int:
        """Generated tokens of all rows, each up to and with its first end mark; after it a row is padding."""
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        marks = torch.tensor([ends] if isinstance(ends, int) else ends or [])
        ended_BN = torch.isin(generated_BN, marks).cumsum(1) - torch.isin(generated_BN, marks).long() > 0
        return int((~ended_BN).sum())

    def _losses(self, encoded: Sequence[Encoded]) -> Scored:
        """Sum of -ln p over each record's supervised tokens: the fused loss with one "task" per record, no logits."""
        from cotbal_kernels.huggingface import apply_fused_loss

        if not self._patched:
            apply_fused_loss(self.model, num_tasks=self.batch_size)
            self._patched = True
        text = self._text(encoded, "right")
        labels_BS = pad([one.labels for one in encoded], IGNORE_INDEX, text["input_ids"].shape[1])
        out = self.model(
            **text,
            labels=labels_BS.to(self._device),
            loss_task_ids=torch.arange(len(encoded), device=self._device),
            **self._images(encoded),
        )
        sums, tokens = out.task_loss.tolist(), out.task_tokens.tolist()
        return Scored([{"loss_sum": sums[row], "tokens": tokens[row]} for row in range(len(encoded))], 0)

    def _text(self, encoded: Sequence[Encoded], side: Literal["left", "right"]) -> dict[str, Tensor]:
        """Token ids, attention mask and token types, each ``[B, S]`` int64 on the model's device."""
        width = max(len(one.input_ids) for one in encoded)
        rows = {
            "input_ids": pad([one.input_ids for one in encoded], padding_token(self.tokenizer), width, side),
            "attention_mask": pad([[1] * len(one.input_ids) for one in encoded], 0, width, side),
        }
        for name in encoded[0].token_types:
            rows[name] = pad([one.token_types[name] for one in encoded], 0, width, side)
        return {name: row_BS.to(self._device) for name, row_BS in rows.items()}

    def _images(self, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        dtype = next(self.model.parameters()).dtype
        return {
            key: value.to(self._device, dtype=dtype if value.is_floating_point() else None)
            for key, value in stack_images(encoded).items()
        }

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
