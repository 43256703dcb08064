"""The presets hold what the tables need, fit the device, and end in time, all by calculation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import environment, run
from bench.cases import DTYPES, HEADS, LLAVA_SHARE, PRESETS, BalancerCase, LinearCase, LogitsCase, ModelCase
from bench.peers import all_peers
from bench.problems import make
from bench.results import Row
from bench.run import run_preset

CPU = torch.device("cpu")
H200 = PRESETS["h200"]
MEMORY = 78 * 2**30  # bytes that one H100 offers; an H200 has 139 GiB


def linear(preset: str) -> list[LinearCase]:
    return [case for case in PRESETS[preset].cases if isinstance(case, LinearCase)]


def test_h200_covers_heads_sizes_shares_weights_modes_and_dtypes() -> None:
    cases = linear("h200")
    assert {case.head for case in cases} == {"Llama-3", "Qwen2.5", "Gemma-2", "LLaVA-1.5", "SmolLM2"}
    assert {case.M for case in cases if case.head == "Llama-3"} >= {2**k for k in range(10, 17)}
    assert {case.supervised for case in cases} == {1.0, 0.25, LLAVA_SHARE, 0.05}
    assert {case.tasks for case in cases} == {0, 1, 8, 64}
    assert {case.mode for case in cases} == {"train", "loss", "forward", "backward", "frozen_head"}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert len(set(H200.cases)) == len(H200.cases)
    assert {type(case) for case in H200.cases} == {LinearCase, LogitsCase, BalancerCase, ModelCase}


def test_h200_begins_with_the_sizes_that_have_targets() -> None:
    """All of them beside every peer: 12 % of 16384 positions is the size of the largest gain."""
    assert [(case.head, case.M, case.supervised, case.tasks, case.mode) for case in linear("h200")[:3]] == [
        ("Llama-3", 8192, 1.0, 0, "train"),
        ("Llama-3", 8192, LLAVA_SHARE, 0, "train"),
        ("Llama-3", 16384, LLAVA_SHARE, 0, "train"),
    ]


def test_cpu_has_the_cases_of_the_published_table() -> None:
    found = {(case.M, case.V, case.D, case.supervised, case.dtype, case.mode, case.tasks) for case in linear("cpu")}
    assert (2048, 32000, 512, 1.0, "float32", "train", 0) in found
    assert (2048, 32000, 512, 0.12, "float32", "train", 0) in found


@pytest.mark.parametrize("head", [head for head in HEADS.values() if "/" not in head.name], ids=lambda head: head.name)
def test_published_heads(head: object) -> None:
    """Sizes from the models' configuration files."""
    published = {
        "Llama-3": (128256, 4096),
        "Qwen2.5": (152064, 3584),
        "Gemma-2": (256000, 2304),
        "LLaVA-1.5": (32000, 4096),
        "SmolLM2": (49152, 576),
    }
    assert published[head.name] == (head.V, head.D)  # type: ignore[attr-defined]


def bytes_needed(case: LinearCase, materialised: bool) -> float:
    """Upper estimate of device bytes in use: inputs and gradients; their float64 reference; and either the logits of a
    materialising path (16 bytes each: 16-bit logits and gradient, float32 logits, log-probabilities and gradient) or a
    workspace of 4 GiB, the reference's chunks included.
    """
    element = DTYPES[case.dtype].itemsize
    numbers = (case.V + case.M) * case.D
    return numbers * (2 * element + 4 + 8) + (16.0 * case.M * case.V if materialised else 4.0 * 2**30)


def test_h200_fits_the_memory() -> None:
    """Every case without materialised logits; with them all but the largest, for which the run says what is missing."""
    for case in linear("h200"):
        assert bytes_needed(case, materialised=False) < MEMORY, case.label
        if case.M <= 32768:  # with 72.5 GiB the largest
            assert bytes_needed(case, materialised=True) < MEMORY, case.label
    for case in H200.cases:
        if isinstance(case, LogitsCase):  # 16-bit logits, float32 copies, gradients, a float64 reference and gradient
            assert 40.0 * case.M * case.V < MEMORY, case.label
        if isinstance(case, ModelCase):
            parameters = 2.0 * case.V * case.D + case.layers * 14.5 * case.D**2
            # bf16 weight, gradient and two AdamW states, a float64 copy with gradients, and the logits
            assert (8 + 16) * parameters + 24.0 * case.batch * case.sequence * case.V < MEMORY, case.label


def estimated_seconds(case: LinearCase, variants: int) -> float:
    """Seconds on an H200, assumed: 350 TFLOP/s for 16 bits and 35 for float32 on average over the variants, all rows
    computed; 40 in float64; half a second per variant and case to compile, tune and free memory.

    Published times at M=8192 and the Llama-3 head are 34 ms to 154 ms for 26 Tflop: 170 to 750 TFLOP/s.
    """
    products = 3 if case.mode in ("forward", "backward") else case.flops / (2.0 * case.N * case.V * case.D)
    all_rows = products * 2.0 * case.M * case.V * case.D
    step = all_rows / (35e12 if case.dtype == "float32" else 350e12)
    untimed = 2 + H200.warmup  # for equality and for memory
    timed = variants * max(3 * step, min(H200.rounds * step, H200.seconds_per_variant))
    return untimed * variants * step + timed + 6.0 * case.N * case.V * case.D / 40e12 + 0.5 * variants


def test_h200_ends_within_nine_minutes() -> None:
    variants = len(all_peers())
    total = sum(estimated_seconds(case, variants) for case in linear("h200"))
    others = sum(not isinstance(case, LinearCase) for case in H200.cases)
    assert (total + 15 * others) / 60 < 9
    # Whatever the estimate is worth: no case starts later than this, and the last ones are not the longest.
    longest_of_the_last = max(estimated_seconds(case, variants) for case in linear("h200")[-2:])
    assert H200.minutes + longest_of_the_last / 60 < 9


def test_problems_have_exactly_the_supervised_rows() -> None:
    for share in (1.0, 0.25, 0.12, 0.05):
        case = LinearCase("SmolLM2, V/6", 300, share, tasks=7, dtype="float32")
        problem = make(case, torch.device("cpu"))
        assert int((problem.labels_M >= 0).sum()) == case.N == round(300 * share)
        assert problem.weighting is not None
        assert problem.weighting.task_weights_K.shape == (7,)
    again = make(case, torch.device("cpu"))
    assert torch.equal(again.scores, problem.scores)  # the same numbers for every peer, in every process


def test_counted_flops_and_bytes() -> None:
    case = LinearCase("LLaVA-1.5", 1000, 0.25, dtype="bfloat16")
    assert case.flops == 3 * 2 * 250 * 32000 * 4096
    assert replace(case, mode="frozen_head").flops == 2 * 2 * 250 * 32000 * 4096
    weight, hidden, supervised = 2 * 32000 * 4096, 2 * 1000 * 4096, 2 * 250 * 4096
    assert case.traffic == 2 * weight + supervised + hidden + 8 * 1000
    assert replace(case, mode="loss").traffic == weight + supervised + 8 * 1000
    assert LogitsCase(10, 100, 0.5, dtype="float32").traffic == (5 + 10) * 100 * 4


@pytest.mark.parametrize(("field", "value"), [("mode", "sideways"), ("dtype", "int8")])
def test_a_wrong_case_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of .*, got '{value}'"):
        replace(LinearCase("SmolLM2", 8), **{field: value})


def test_a_run_out_of_time_lists_what_it_left_out() -> None:
    preset = replace(PRESETS["quick"], minutes=-1.0)
    said: list[str] = []
    found = run_preset(preset, torch.device("cpu"), "a command", say=said.append)
    assert len(found.rows) == len(preset.cases)
    assert all(row.skipped is not None and row.skipped.startswith("out of time") for row in found.rows)
    assert any("not run, out of time" in line for line in said)


def test_a_run_goes_on_where_it_stopped_without_the_peer_that_stopped_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def measure(case: Any, preset: Any, device: torch.device, peers: list[Any]) -> Row:
        asked.append((case.label, next(peer for peer in peers if peer.name == "quack").unavailable(device)))
        return Row(case.suite, case.label, {}, [])

    monkeypatch.setattr(run, "measure", measure)
    preset, path, cpu = replace(PRESETS["quick"], cases=PRESETS["quick"].cases[:3]), tmp_path / "quick.json", CPU
    first = run_preset(preset, cpu, "a command", path, lambda _: None, only=preset.cases[0].label)
    assert len(first.rows) == 1
    asked.clear()
    both = run_preset(preset, cpu, "another", path, lambda _: None, without=["quack"], resume=True)
    assert [row.label for row in both.rows] == [case.label for case in preset.cases]
    assert both.command == "a command"
    assert [label for label, _ in asked] == [case.label for case in preset.cases[1:]]
    assert all(reason is not None and reason.startswith("left out") for _, reason in asked)


def test_what_was_run_is_known_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.sources() == environment.sources()
    for folder in environment.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "bench" / "a.py").write_text("1")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    before = environment.sources()
    assert environment.commit() is None
    (tmp_path / "bench" / "notes.txt").write_text("no source")
    assert environment.sources() == before
    (tmp_path / "bench" / "a.py").write_text("2")
    assert environment.sources() != before
