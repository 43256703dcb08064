"""An evaluation from its first batch to ``metrics.json``: started, gone on with after a kill, or found finished.

1. ``prepare``: the folder is this evaluation's (``manifest.json``).
2. Ranks measure the records, which fixes the batches (``parts/plan.json``). Then they take batches and append them to
   ``parts/rank-<k>.jsonl``.
3. ``finish``: parts become ``<set>.jsonl`` in record order, each written whole or not at all; then ``metrics.json``;
   then ``parts/`` goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.data.records import IMAGE_PLACEHOLDER, Record, write_jsonl
from trainer.errors import UserError
from trainer.evaluation.manifest import claim_folder, describe, read_throughput, write_throughput
from trainer.evaluation.parts import Claims, Finished, Tail, busy_seconds, collect, no_ranks, sole_use
from trainer.evaluation.planning import Batch, has_plan, read_plan, split_plan, write_plan
from trainer.evaluation.progress import Meter
from trainer.evaluation.ranks import RankProcesses, measure, run_rank
from trainer.evaluation.scoring import check_references, compute, entry, images_of, read_predictions, score_key
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.files import known, write_json
from trainer.units import duration

Result = TypeVar("Result")
_POLL = 0.5  # seconds
_PATIENCE = 1800.0  # seconds that ranks wait for another one, as those of a training do on GPUs
_GOODBYE = 60.0  # seconds that the batches on the devices have where an evaluation is ended


@dataclass(frozen=True)
class Work:
    """What is left to do: numbers of batches, and records done before and in all."""

    todo: list[int]
    done: int
    total: int


def evaluate(
    spec: EvaluationSpec,
    processes: RankProcesses | None = None,
    report: Callable[[Meter], None] = lambda meter: None,
) -> dict[str, Any]:
    """Scores a model on every set; returns and writes ``metrics.json``. Run again after a kill, it continues.

    Args:
        processes: where the ranks run, at least one for each of ``spec.devices``; None is this process, for one rank.
        report: called about twice a second with how far it is. An exception that it raises ends the evaluation after
            the batches that are on the devices, or after a minute; what is done is kept.

    Raises:
        UserError: bad records, images or model, too little memory, a folder that holds another evaluation, a rank
            that was ended from outside, or one that the others have waited for for half an hour.
    """
    if processes is None and len(spec.devices) != 1:
        raise ValueError(f"{len(spec.devices)} ranks need processes to run in")

    def call(work: Callable[..., Result], *arguments: Any) -> Result:
        if processes is None:
            return work(*arguments)
        return _results(processes, [processes.submit(0, work, *arguments)], waiting)[0]

    def waiting() -> None:
        report(Meter(0, 0))

    try:
        with sole_use(spec.output_dir):
            total = call(prepare, spec)
            work = Work([], total, total)
            if not _answered(spec):
                spec.parts.mkdir(exist_ok=True)
                with no_ranks(spec.output_dir):
                    if not has_plan(spec):
                        write_plan(spec, _lengths(spec, processes, total, waiting))
                    work = _left(spec, total)
            meter = Meter(work.done, work.total)
            report(meter)
            if work.todo:
                Claims(spec.parts).open(min(len(spec.devices), len(work.todo)))
                tail = Tail(spec.parts)

                def poll() -> None:
                    for finished in tail():
                        meter.add(finished)
                    report(meter)

                if processes is None:
                    run_rank(spec, 0, work.todo, poll)
                else:
                    _run_ranks(spec, processes, work.todo, meter, poll)
            return call(finish, spec)
    except BrokenProcessPool as error:
        raise UserError(
            f"the evaluation into {spec.output_dir} was ended from outside (out of memory?); "
            "lower evaluation.batch_size or launch.processes and run again: what is done is kept"
        ) from error


def _run_ranks(
    spec: EvaluationSpec, processes: RankProcesses, todo: list[int], meter: Meter, poll: Callable[[], None]
) -> None:
    ranks = min(len(spec.devices), len(todo))
    running = {processes.submit(rank, run_rank, spec, rank, todo): rank for rank in range(ranks)}
    try:
        while running:
            for future in wait(running, timeout=_POLL, return_when=FIRST_EXCEPTION).done:
                del running[future]
                future.result()
            if len(running) < ranks:
                meter.waiting_for = sorted(running.values())
            poll()
            if meter.waiting_for and meter.silence > _PATIENCE:
                raise UserError(
                    f"rank {', '.join(map(str, meter.waiting_for))} of the evaluation into {spec.output_dir} hangs, or "
                    f"its GPU or the file system does: the others have waited for it for {duration(_PATIENCE)}; run "
                    "again: what is done is kept"
                )
    except BaseException:
        Claims(spec.parts).close()
        if wait(running, timeout=_GOODBYE).not_done:  # for the batches that are on the devices
            processes.end()
        raise


def _results(processes: RankProcesses, running: Sequence[Future[Result]], poll: Callable[[], None]) -> list[Result]:
    """Of work that keeps nothing before its end: where `poll` raises, nobody waits for it."""
    left = set(running)
    try:
        while left := wait(left, timeout=_POLL).not_done:
            poll()
    except BaseException:
        processes.end()
        raise
    return [future.result() for future in running]


def _lengths(
    spec: EvaluationSpec, processes: RankProcesses | None, total: int, poll: Callable[[], None]
) -> list[list[int]]:
    """Tokens of every record of every set, which all ranks measure: for one alone it would be minutes."""
    ranks = min(len(spec.devices), -(-total // spec.batch_size))
    if processes is None:
        return measure(spec, 0, 1)
    shares = _results(processes, [processes.submit(rank, measure, spec, rank, ranks) for rank in range(ranks)], poll)
    lengths = []
    for own in zip(*shares, strict=True):  # of one set
        count = sum(map(len, own))
        lengths.append([own[record % ranks][record // ranks] for record in range(count)])
    return lengths


def _left(spec: EvaluationSpec, total: int) -> Work:
    """What is left of the plan."""
    plan = read_plan(spec)
    done = collect(spec.parts, plan)
    plan = split_plan(spec, plan, done)
    todo = [number for number in range(len(plan)) if number not in done]
    return Work(todo, sum(len(plan[number].records) for number in done), total)


def _answered(spec: EvaluationSpec) -> bool:
    """Whether all predictions are there."""
    return all(spec.predictions(chosen).exists() for chosen in spec.sets)


def prepare(spec: EvaluationSpec) -> int:
    """Claims the folder and checks records and images; returns how many records there are.

    Raises:
        UserError: as :func:`evaluate`.
    """
    records = [chosen.load() for chosen in spec.sets]
    for chosen, own in zip(spec.sets, records, strict=True):
        _ = chosen.teacher_forced  # metrics that exclude each other
        check_references(chosen.metrics, {f"record '{record.id}'": record.answers for record in own}, chosen.title)
        _check_images(chosen, own)
    claim_folder(spec, describe(spec, records))
    return sum(map(len, records))


def _check_images(chosen: EvaluationSet, records: Sequence[Record]) -> None:
    for record in records:
        for image in record.images:
            if not chosen.image_path(image).is_file():
                raise UserError(
                    f"{chosen.title}, record '{record.id}': image {chosen.image_path(image)} does not exist; "
                    "image paths start from image_root (--image-root)"
                )


def finish(spec: EvaluationSpec) -> dict[str, Any]:
    """Merges the parts, scores the predictions and writes ``metrics.json``; can be run again at any point."""
    if not _answered(spec):
        _merge(spec)
    throughput = read_throughput(spec)
    metrics: dict[str, Any] = {}
    for chosen in spec.sets:
        generated = bool(chosen.metrics) and not chosen.teacher_forced
        rows = read_predictions(spec.predictions(chosen), answers=generated, losses=chosen.teacher_forced)
        results = {name: compute(name, rows) for name in chosen.metrics}
        images = images_of(rows)
        scores = {name: entry(name, result, images) for name, result in results.items()}
        if not spec.by_task:
            metrics = {"metrics": scores, "throughput": throughput.get(chosen.key)}
            continue
        for row, value in zip(rows, results[chosen.metrics[0]].per_sample, strict=True):
            row["score"] = known(value)
        write_jsonl(spec.predictions(chosen), rows)
        for name, score in scores.items():
            metrics[score_key(chosen, name)] = score | {"throughput": throughput.get(chosen.key)}
    write_json(spec.output_dir / "metrics.json", metrics)
    with suppress(FileNotFoundError):
        shutil.rmtree(spec.parts)
    return metrics


def _merge(spec: EvaluationSpec) -> None:
    plan = read_plan(spec)
    done = collect(spec.parts, plan)
    missing = len(plan) - len(done)
    if missing:
        raise RuntimeError(f"{missing} of {len(plan)} batches are missing in {spec.parts}; run the evaluation again")
    records = [chosen.load() for chosen in spec.sets]
    write_throughput(spec, {chosen.key: _throughput(plan, done, index) for index, chosen in enumerate(spec.sets)})
    results: list[dict[int, dict[str, Any]]] = [{} for _ in spec.sets]
    for number, batch in enumerate(plan):
        results[batch.set_index].update(zip(batch.records, done[number].results, strict=True))
    for chosen, own, found in zip(spec.sets, records, results, strict=True):
        write_jsonl(
            spec.predictions(chosen),
            [_row(record, bool(chosen.metrics)) | found[index] for index, record in enumerate(own)],
        )


def _row(record: Record, scored: bool) -> dict[str, Any]:
    question = record.turns[-1].question
    if record.images:
        question = question.replace(IMAGE_PLACEHOLDER, "")
    return {
        "id": record.id,
        "image": record.images[0] if record.images else None,
        "question": question.strip(),
        # Where nothing is scored, an empty answer stands for a missing one.
        "references": record.answers if scored or record.answers != [""] else [],
    }


def _throughput(plan: Sequence[Batch], done: dict[int, Finished], set_index: int) -> dict[str, Any]:
    """Sums over the batches of a set. ``seconds`` is the time in which at least one rank was at one of them."""
    own = [done[number] for number, batch in enumerate(plan) if batch.set_index == set_index]
    seconds = busy_seconds((finished.started, finished.ended) for finished in own)
    samples = sum(len(finished.results) for finished in own)
    prompt, padded, generated = (
        sum(getattr(finished, key) for finished in own)
        for key in ("prompt_tokens", "padded_tokens", "generated_tokens")
    )
    return {
        "seconds": round(seconds, 3),
        "samples": samples,
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "samples_per_second": round(samples / max(seconds, 1e-9), 3),
        "tokens_per_second": round((generated or prompt) / max(seconds, 1e-9), 3),  # losses generate nothing
        "padding_share": round(1 - prompt / padded, 4),
    }
