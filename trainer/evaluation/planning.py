"""Which records go through the model together: batches that do not depend on the number of ranks.

Padding changes the last bits of what a model computes, so a record's neighbours can decide a near tie between two
tokens. The batches are therefore the same for 1 and for N ranks, before and after a restart, and ranks share them out
whole. Within a set, records are sorted by length, longest first (ties in record order), and cut into batches. The
batches of all sets are then ordered by cost, the dearest first: a batch too large for memory fails at once, and the
ranks that take one after the other end at about the same time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.encoding import ConversationEncoder, Encoded
from trainer.data.lengths import counter_of
from trainer.data.records import Record
from trainer.evaluation.generation import encode
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.files import write_json

_PROBES = ((64, 64), (1344, 336))  # pixels; a processor with a dynamic resolution tells them apart


@dataclass(frozen=True)
class Batch:
    """Records of one set, by position in it."""

    set_index: int
    records: tuple[int, ...]


def plan_batches(lengths: Sequence[Sequence[int]], new_tokens: Sequence[int], batch_size: int) -> list[Batch]:
    """The batches of an evaluation in the order in which ranks take them.

    Args:
        lengths: tokens of every record of every set.
        new_tokens: for every set, the most tokens that a record gets on top.
        batch_size: records of a batch; the last one of a set may have fewer.
    """
    batches: list[tuple[int, Batch]] = []
    for index, (own, new) in enumerate(zip(lengths, new_tokens, strict=True)):
        order = sorted(range(len(own)), key=lambda record: -own[record])  # stable: ties stay in record order
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            cost = len(chosen) * (own[chosen[0]] + new)
            batches.append((cost, Batch(index, tuple(chosen))))
    batches.sort(key=lambda item: -item[0])
    return [batch for _, batch in batches]


def write_plan(spec: EvaluationSpec, lengths: Sequence[Sequence[int]]) -> None:
    """Makes the plan and keeps it, so that a restart need not measure every record again."""
    new_tokens = [0 if chosen.teacher_forced else chosen.max_new_tokens for chosen in spec.sets]
    _keep(spec, plan_batches(lengths, new_tokens, spec.batch_size))


def has_plan(spec: EvaluationSpec) -> bool:
    """Whether there is one."""
    return _path(spec).exists()


def split_plan(spec: EvaluationSpec, batches: Sequence[Batch], done: Collection[int]) -> list[Batch]:
    """Cuts the batches that are left where they are larger than the spec's; those that are done keep their numbers."""
    plan: list[Batch] = []
    more: list[Batch] = []
    for number, batch in enumerate(batches):
        size = len(batch.records) if number in done else spec.batch_size
        own = [batch.records[start : start + size] for start in range(0, len(batch.records), size)]
        plan.append(Batch(batch.set_index, own[0]))
        more += [Batch(batch.set_index, records) for records in own[1:]]
    if more:
        _keep(spec, plan + more)
    return plan + more


def read_plan(spec: EvaluationSpec) -> list[Batch]:
    """The plan that :func:`write_plan` or :func:`split_plan` left."""
    return [Batch(index, tuple(records)) for index, *records in json.loads(_path(spec).read_text())]


def _keep(spec: EvaluationSpec, batches: Sequence[Batch]) -> None:
    write_json(_path(spec), [[batch.set_index, *batch.records] for batch in batches])


def _path(spec: EvaluationSpec) -> Path:
    return spec.parts / "plan.json"


def prompt_sizes(encoder: ConversationEncoder) -> Callable[[Record, EvaluationSet], int]:
    """A function for the length of a record in tokens that decodes no image."""
    plain = counter_of(encoder)
    return lambda record, chosen: len(_encode(plain, record, chosen).input_ids)


def _encode(encoder: ConversationEncoder, record: Record, chosen: EvaluationSet) -> Encoded:
    (encoded,) = encode(encoder, chosen, [record])
    return encoded
