"""Ranks: processes that each hold the model and take batches until none is left.

They share a counter and nothing else. No collective is called while generating, so no rank waits for another one,
however many batches each of them gets through, and a rank that dies leaves the others' work whole.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from trainer.config import ModelConfig
from trainer.data.encoding import ConversationEncoder, Encoded
from trainer.evaluation.generation import BatchScorer, encode
from trainer.evaluation.parts import Claims, Finished, PartFile, as_rank
from trainer.evaluation.planning import prompt_sizes, read_plan
from trainer.evaluation.spec import EvaluationSpec
from trainer.launching import die_with_parent, starting
from trainer.models.features import FeatureStore
from trainer.models.loading import (
    embedded_tokens,
    load_config,
    load_model,
    load_processor,
    positions,
    table_of_positions,
)

Result = TypeVar("Result")


class RankProcesses:
    """Warm processes, one for each rank, started when first asked for something."""

    def __init__(self, ranks: int) -> None:
        self._pools: list[ProcessPoolExecutor | None] = [None] * ranks

    def submit(self, rank: int, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """`work` in the process of `rank`, which is the same for every call: it never touches another one's GPU."""
        pool = self._pools[rank]
        if pool is None:
            pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=die_with_parent, initargs=(os.getpid(),)
            )
            self._pools[rank] = pool
        with starting():
            return pool.submit(work, *arguments)

    def end(self) -> None:
        """Ends the processes whatever they are at; what waits for them gets an error."""
        for pool in self._pools:
            for process in list(pool._processes.values()) if pool is not None else ():  # Python 3.14: kill_workers()
                process.kill()
        self.close()

    def close(self) -> None:
        """Ends the processes, which gives their memory back; later calls start new ones."""
        for rank, pool in enumerate(self._pools):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
            self._pools[rank] = None


def load_encoder(spec: EvaluationSpec) -> ConversationEncoder:
    """The model folder's processor, with cached features where the spec has them; cuts at the model's positions."""
    features = FeatureStore(spec.features) if spec.features else None
    processor = load_processor(str(spec.model_path), spec.images)
    config = load_config(str(spec.model_path))
    most = positions(config) or spec.max_length
    limits = table_of_positions(config), embedded_tokens(config)
    return ConversationEncoder(processor, min(spec.max_length, most), features, *limits)


def measure(spec: EvaluationSpec, rank: int, ranks: int) -> list[list[int]]:
    """A rank's share of the lengths in tokens: of each set, those of the records `rank`, `rank` + `ranks`, ...

    Raises:
        UserError: a record that cannot be encoded.
    """
    sizes = prompt_sizes(load_encoder(spec))
    return [[sizes(record, chosen) for record in chosen.load()[rank::ranks]] for chosen in spec.sets]


def run_rank(spec: EvaluationSpec, rank: int, todo: Sequence[int], after: Callable[[], None] = lambda: None) -> None:
    """Does batches of `todo` (numbers in the plan) that no other rank has taken, until none is left.

    Args:
        after: called after every batch.

    Raises:
        UserError: an image or a record cannot be used, or memory does not suffice.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        with as_rank(spec.output_dir):
            _work(spec, rank, todo, after)
    finally:
        torch.set_num_threads(threads)
        if torch.cuda.is_initialized():
            gc.collect()  # a patched model refers to itself
            torch.cuda.empty_cache()


def _work(spec: EvaluationSpec, rank: int, todo: Sequence[int], after: Callable[[], None]) -> None:
    plan = read_plan(spec)
    records = [chosen.load() for chosen in spec.sets]
    encoder = load_encoder(spec)
    claims = Claims(spec.parts)

    def take(reserved: int | None = None) -> tuple[int, list[Encoded]] | None:
        """The next batch, encoded; in a thread of its own, while the batch before it is on the device."""
        position = claims.take(reserved)
        if position >= len(todo):
            return None
        batch = plan[todo[position]]
        chosen = spec.sets[batch.set_index]
        return todo[position], encode(encoder, chosen, [records[batch.set_index][index] for index in batch.records])

    scorer: BatchScorer | None = None
    with ThreadPoolExecutor(1) as ahead, PartFile(spec.parts, rank) as part:
        waiting = ahead.submit(take, rank)
        while (taken := waiting.result()) is not None:
            waiting = ahead.submit(take)
            number, encoded = taken
            if scorer is None:
                scorer = _load(spec, rank, encoder)
            started = time.time()
            scored = scorer(spec.sets[plan[number].set_index], encoded)
            lengths = [len(one.input_ids) for one in encoded]
            part.append(
                Finished(
                    number,
                    scored.results,
                    prompt_tokens=sum(lengths),
                    padded_tokens=len(lengths) * max(lengths),
                    generated_tokens=scored.generated_tokens,
                    started=started,
                    ended=time.time(),
                )
            )
            after()


def _load(spec: EvaluationSpec, rank: int, encoder: ConversationEncoder) -> BatchScorer:
    options = ModelConfig(path=str(spec.model_path), freeze=[], attention=spec.attention)
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    model = load_model(str(spec.model_path), options, dtype).to(spec.devices[rank])
    return BatchScorer(model, encoder.tokenizer, spec.batch_size, encoder.chat.gap)
