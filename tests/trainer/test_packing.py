"""Packed sequences: the loss and the gradients of the samples one by one, on every attention a user may have."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from packing_models import (
    VOCABULARY,
    WEIGHTS,
    blank_image,
    documents,
    gpt2,
    llama,
    llava,
    mistral,
    mixtral,
    one_by_one,
)
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from cotbal_kernels import global_normalizer, global_task_tokens
from cotbal_kernels.huggingface import apply_fused_loss
from trainer.data.encoding import IGNORE_INDEX, Encoded
from trainer.data.packing import PackedCollator, pack

# Float32 against float64: sums of up to 80 terms of magnitude up to about 4, a few units of 2^-24 each.
TOLERANCE = 1e-6
CAPACITY = 24  # tokens of a sequence in these tests: three sequences and more
MODELS: dict[str, Callable[..., Any]] = {
    "llava": llava,
    "llama": llama,
    "gpt2": gpt2,
    "mistral": mistral,
    "mixtral": mixtral,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On machines that other work shares, threads of such small products wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(documents: list[tuple[Encoded, int]]) -> list[list[dict[str, Any]]]:
    chosen = pack([len(encoded.input_ids) for encoded, _ in documents], CAPACITY, seed=5)
    assert len(chosen) > 3, "the test is of several sequences"
    assert any(len(sequence) > 2 for sequence in chosen)
    return [[{"encoded": documents[i][0], "task_id": documents[i][1]} for i in sequence] for sequence in chosen]


def batches(name: str, flat: bool, micro_batches: int = 2) -> list[dict[str, Any]]:
    """The documents as packed micro-batches."""
    rows = sequences(documents(images=name == "llava"))
    collate = PackedCollator(0, blank_image() if name == "llava" else None, flat)
    size = -(-len(rows) // micro_batches)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def packed(model: Any, window: list[dict[str, Any]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, tokens per task and gradients of an accumulation window through the fused loss."""
    apply_fused_loss(model, task_weights=WEIGHTS)
    normalizer = global_normalizer(
        [batch["labels"] for batch in window], [batch["loss_task_ids"] for batch in window], WEIGHTS, shift=True
    )
    losses, tokens = [], torch.zeros(len(WEIGHTS), dtype=torch.int64)
    for batch in window:
        out = model(**batch, num_items_in_batch=normalizer)
        out.loss.backward()
        losses.append(out.loss.detach())
        tokens += out.task_tokens
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return torch.stack(losses).sum(), tokens, gradients


def error(found: tuple[Tensor, Tensor, dict[str, Tensor]], expected: tuple[Tensor, Tensor, dict[str, Tensor]]) -> float:
    """The largest error of loss and gradients; tokens must be equal."""
    assert set(found[2]) == set(expected[2])
    errors = [(found[2][name].double() - gradient).abs().max() for name, gradient in expected[2].items()]
    return float(torch.stack([(found[0].double() - expected[0]).abs(), *errors]).max())


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_documents_alone(name: str, attention: str, flat: bool) -> None:
    expected = one_by_one(MODELS[name](attention), documents(images=name == "llava"))
    found = packed(MODELS[name](attention), batches(name, flat))
    assert found[1].tolist() == expected[1].tolist()
    assert error(found, expected) < TOLERANCE
    largest = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert largest > 0.05, "gradients too small for the tolerance to mean anything"


def positions_go_on(batch: dict[str, Any]) -> None:
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


def mask_instead_of_positions(batch: dict[str, Any]) -> None:
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])


def cache_left_on(batch: dict[str, Any]) -> None:
    del batch["use_cache"]


def first_token_predicted(batch: dict[str, Any]) -> None:
    starts = (batch["position_ids"] == 0) & (batch["input_ids"] != 0)
    batch["labels"] = torch.where(starts, batch["input_ids"], batch["labels"])


def images_in_another_order(batch: dict[str, Any]) -> None:
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].flip(0)


def one_task_per_sequence(batch: dict[str, Any]) -> None:
    batch["loss_task_ids"] = batch["loss_task_ids"][:, 0]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in MODELS for damage in (positions_go_on, mask_instead_of_positions, cache_left_on)),
        ("llava", first_token_predicted), ("llama", first_token_predicted), ("llava", images_in_another_order),
        ("llava", one_task_per_sequence), ("llama", one_task_per_sequence),
    ],
)  # fmt: skip
def test_what_the_comparison_notices(name: str, damage: Callable[[dict[str, Any]], None]) -> None:
    """Every part of the layout is needed: without it the loss is off by a hundred tolerances and more."""
    expected = one_by_one(MODELS[name](), documents(images=name == "llava"))
    window = batches(name, flat=False)
    for batch in window:
        damage(batch)
    assert error(packed(MODELS[name](), window), expected) > 100 * TOLERANCE


def test_positions_start_again_even_where_the_mask_is_right() -> None:
    """Learnt absolute positions, and the right mask given: positions that go on change the loss by themselves."""
    expected = one_by_one(gpt2(), documents(images=False))
    window = batches("gpt2", flat=False)
    for batch in window:
        index = (batch["position_ids"] == 0).cumsum(1)
        causal = torch.ones(index.shape[1], index.shape[1], dtype=torch.bool).tril()
        batch["attention_mask"] = ((index[:, :, None] == index[:, None, :]) & causal)[:, None]
    assert error(packed(gpt2(), window), expected) < TOLERANCE
    for batch in window:
        positions_go_on(batch)
    assert error(packed(gpt2(), window), expected) > 100 * TOLERANCE


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    """What ``flash_attn_varlen_func`` computes, a document at a time; ``[T, heads, head size]``."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert options["causal"]
    out = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["softmax_scale"]))
    return torch.cat([x.transpose(0, 1) for x in out])


@pytest.mark.parametrize("name", ["llava", "llama"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "rows"])
def test_flash_attention_gets_every_document(name: str, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU; what transformers hands to it does not. In rows it would not tell documents apart."""

    def whole(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        lengths = torch.arange(len(query) + 1) * query.shape[1]
        flattened = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        return varlen(*flattened, lengths, lengths, **options).view_as(query)

    def options(**given: Any) -> dict[str, Any]:
        return {"causal": given["is_causal"], "softmax_scale": given["softmax_scale"]}

    # As if the package had been imported: transformers looks no further for a kernel that is loaded.
    loaded = {"_flash_fn": whole, "_flash_varlen_fn": varlen, "_process_flash_kwargs_fn": options}
    for attribute, value in {"_loaded_implementation": "flash_attention_2", **loaded}.items():
        monkeypatch.setattr(flash, attribute, value)
    expected = one_by_one(MODELS[name](), documents(images=name == "llava"))
    model = MODELS[name]()
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    off = error(packed(model, batches(name, flat)), expected)
    assert off < TOLERANCE if flat else off > 100 * TOLERANCE


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_layout(flat: bool) -> None:
    """Three documents in two sequences, written out by hand."""
    one = Encoded([11, 12, 13], [11, IGNORE_INDEX, 13])
    two = Encoded([21, 22], [IGNORE_INDEX, 22], {"pixel_values": torch.full((1, 2), 2.0)})
    three = Encoded([31, 32], [31, 32], {"pixel_values": torch.full((2, 2), 3.0)})
    rows = [
        [{"encoded": one, "task_id": 4}, {"encoded": two, "task_id": 1}],
        [{"encoded": three, "task_id": 2}],
    ]
    batch = PackedCollator(9, blank_image(), flat)(rows)
    n = IGNORE_INDEX
    expected = {
        "input_ids": [[11, 12, 13, 21, 22], [31, 32, 9, 9, 9]],
        "labels": [[n, n, 13, n, 22], [n, 32, n, n, n]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        "loss_task_ids": [[4, 4, 4, 1, 1], [2, 2, 0, 0, 0]],
    }
    if flat:
        expected = {key: [[*first, *second[:2]]] for key, (first, second) in expected.items()}
    assert {key: batch[key].tolist() for key in expected} == expected
    assert batch["pixel_values"].tolist() == [[2, 2], [3, 3], [3, 3]]
    assert batch["use_cache"] is False
    assert set(batch) == {*expected, "pixel_values", "use_cache"}


def test_a_batch_of_text_gets_a_blank_image_that_changes_nothing() -> None:
    """Only text, two sequences: the projector takes part in the backward pass and the loss is the text's."""
    text = [item for item in documents(images=False) if item[1] != 2][:5]
    rows = [[{"encoded": encoded, "task_id": task} for encoded, task in part] for part in (text[:2], text[2:])]
    batch = PackedCollator(0, blank_image())(rows)
    assert batch["pixel_values"].shape[0] == 1
    model = llava()
    found = packed(model, [batch])
    assert all(p.grad is not None for n, p in model.named_parameters() if "projector" in n)
    assert error(found, one_by_one(llava(), text)) < TOLERANCE


def test_global_counts_of_tokens_with_tasks_of_their_own() -> None:
    """The normaliser's count, by hand: a label counts for the task of its own position, not of the one before it."""
    window = batches("llama", flat=False)
    expected = [0] * len(WEIGHTS)
    for encoded, task in documents(images=False):
        expected[task] += sum(label != IGNORE_INDEX for label in encoded.labels[1:])
    found = global_task_tokens(
        [b["labels"] for b in window], [b["loss_task_ids"] for b in window], len(WEIGHTS), shift=True
    )
    assert found.tolist() == expected


class TestPack:
    @example([50, 3, 50], 50, 20, 0)  # a sample that was cut fills a sequence
    @given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 90), st.integers(1, 20), st.integers(0, 3))
    def test_first_fit_decreasing_in_windows(self, lengths: list[int], capacity: int, window: int, seed: int) -> None:
        """Against the definition spelled out sequence by sequence."""
        order = list(range(len(lengths)))
        random.Random(f"{seed}/packing").shuffle(order)
        expected: list[list[int]] = []
        for start in range(0, len(order), window):
            bins: list[list[int]] = []
            for sample in sorted(order[start : start + window], key=lambda i: lengths[i], reverse=True):
                for chosen in bins:
                    if sum(lengths[i] for i in chosen) + lengths[sample] <= capacity:
                        chosen.append(sample)
                        break
                else:
                    bins.append([sample])
            expected += bins
        found = pack(lengths, capacity, seed, window)
        assert found == expected
        assert sorted(sample for sequence in found for sample in sequence) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in sequence) <= capacity for sequence in found)

    def test_order_is_random_and_repeatable(self) -> None:
        """A window of 1024 of 5000 samples: neighbours in the file are spread out, and sequences nearly full."""
        generator = random.Random(0)
        lengths = [generator.randint(20, 700) for _ in range(5000)]
        found = pack(lengths, 2048, seed=1)
        assert found == pack(lengths, 2048, seed=1)
        assert found != pack(lengths, 2048, seed=2)
        assert sum(lengths) / (2048 * len(found)) > 0.97
        means = [sum(sequence) / len(sequence) for sequence in found]
        half = len(found) // 2  # sequences of the first half would hold the first samples, were they not shuffled
        assert abs(sum(means[:half]) / half - 2500) < 250

    @pytest.mark.parametrize("length", [0, 9])
    def test_a_sample_that_does_not_fit(self, length: int) -> None:
        with pytest.raises(ValueError, match=f"sample 1 has {length} tokens; a sequence takes 1 to 8"):
            pack([3, length], 8, seed=0)


def test_vocabulary_is_used() -> None:
    """The documents hold plain tokens only where no image is: else placeholders would be taken for words."""
    for encoded, _ in documents(images=False):
        assert max(encoded.input_ids) < VOCABULARY - 1
