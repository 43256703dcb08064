"""The document and the page say what is in the JSON."""

import re
from pathlib import Path

import pytest
from example_run import example_run

from bench.__main__ import COMMITTED, DOCUMENT, main
from bench.page import page
from bench.plots import memories, strokes, sweeps, times
from bench.report import markdown, read_runs, run_section
from bench.results import Entry


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_values_of_the_table() -> None:
    text = run_section(example_run())
    eager, *_ = lines_of(text, "| eager |")
    # ms and ratio with quartiles, 0.0975 s over 0.01 s of products, MiB, the largest deviation, rounds
    assert eager == "| eager | 97.5 (90 to 100) | 7.80 (7.50 to 8.10) | 9.75 | 512 | 6.1e-07 | 3 |"
    assert lines_of(text, "| cotbal |")[0] == "| cotbal | 12.5 (11 to 13) | 1.00 | 1.25 | 3 | 4.2e-07 | 3 |"
    assert text.index("\n| cotbal |") < text.index("\n| eager |")  # the fastest first, not ours first
    assert "24 Gflop counted; 128 MiB that cannot be avoided; bare products 10 (9 to 11) ms (2.4 TFLOP/s)" in text
    # 3 MB at 2 GB/s are 1.5 ms; 3 ms are twice that
    assert "| eager | 3 (3 to 3) |  | 2.00 |  | 0 |" in text


def test_nobody_is_dropped() -> None:
    text = run_section(example_run())
    assert "- liger: cannot run here: liger-kernel is not installed (bench/peers.txt)" in text
    assert "- broken: **failed**: RuntimeError: a | b went wrong" in text
    assert "**a late case**\n\nNot run: out of time" in text


def test_who_could_not_run_in_any_case_is_named_once() -> None:
    """Not so who failed in all of them, or could not run in some."""
    run = example_run()
    *_, liger, broken = run.rows[0].entries
    eager = Entry("eager", "unavailable", "is at lunch")
    for row in (row for row in run.rows[1:] if not row.skipped):
        row.entries = [*(entry for entry in row.entries if entry.name != "eager"), liger, broken, eager]
    text = run_section(run)
    assert lines_of(text, "- liger") == ["- liger: liger-kernel is not installed (bench/peers.txt)"]
    assert len(lines_of(text, "- broken: **failed**")) == 3
    assert lines_of(text, "- eager") == ["- eager: cannot run here: is at lunch"] * 2


def test_rounds_that_the_allocator_disturbed_are_named() -> None:
    run = example_run()
    assert "freed" not in run_section(run)
    run.rows[0].entries[0].retried = 2
    note = "eager: in 2 of 3 rounds memory was freed and asked for again, which took time too"
    assert f"- {note}\n" in run_section(run)
    assert f"<p>{note}.</p>" in page([run])


def test_summary_has_the_ratios_of_the_training_cases() -> None:
    text = run_section(example_run())
    row, other = lines_of(text, "| LLaVA-1.5 32000x512 |")
    assert row == "| LLaVA-1.5 32000x512 | 2048 | 12% | float32 | 7.80 | 1.00 |"
    assert other.split(" | ")[1] == "1024"


def test_who_stopped_a_run_is_among_its_facts() -> None:
    run = example_run()
    run.environment["left out"] = {"slow": {"case": "a late case", "error": "did not end within 120 s"}}
    line = "slow stopped the run in a late case and was left out from there on: did not end within 120 s"
    assert f"- {line}\n" in run_section(run)
    assert f"<li>{line}</li>" in page([run])


def test_where_the_numbers_come_from() -> None:
    text = run_section(example_run())
    assert "`python -m bench run --preset cpu`, 2026-01-02T03:04:05+00:00, commit 0123456789ab" in text
    assert "Example Processor, 2 cores, 2 threads, load before the run 0.1" in text
    assert "python 3.11.4, torch 2.13.0" in text
    assert "liger-kernel None" not in text


def test_a_document_without_gpu_results_says_so() -> None:
    run = example_run()
    assert "No results from a GPU are committed yet" in markdown([run])
    run.environment["kind"] = "cuda"
    assert "No results from a GPU" not in markdown([run])


def test_page_has_tables_reasons_and_figures() -> None:
    text = page([example_run()])
    assert "<td>97.5 (90 to 100)</td><td>7.80 (7.50 to 8.10)</td><td>9.75</td><td>512</td>" in text
    assert "liger: cannot run here: liger-kernel is not installed" in text
    assert "Not run: out of time" in text
    assert len(re.findall("<figure", text)) == 3
    for label in ("Time against M", "Memory against M", "Time as a multiple of the bare matrix products"):
        assert f'aria-label="{label}"' in text
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)  # nothing is loaded from elsewhere


def test_page_of_nothing_says_so() -> None:
    assert "There are no results in the folders given" in page([])


def test_curves_hold_the_medians_and_the_peaks() -> None:
    (rows,) = sweeps(example_run()).values()
    assert times(rows)["eager"] == ([1024, 2048], [97.5, 97.5])
    assert memories(rows)["cotbal"] == ([1024, 2048], [3.0, 3.0])
    assert memories(rows[:1]) == {}  # one size is no line


def test_every_peer_has_its_own_stroke() -> None:
    names = [f"peer {k}" for k in range(14)]
    found = strokes(["cotbal", *names])
    assert len(set(map(repr, found.values()))) == 15
    assert found["cotbal"] == ("blue", "-", "o")


def test_docs_are_what_the_committed_results_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(read_runs([COMMITTED])), (
        "docs/benchmarks.md is not up to date: run `python -m bench report`"
    )


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example_run().write(tmp_path / "results" / "cpu.json")
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "results"), "--html", str(tmp_path / "page.html")]) == 0
    assert "Example Processor" in (tmp_path / "page.html").read_text()
    for arguments, message in (
        (["report", str(tmp_path / "nowhere")], "nowhere is not a folder; `python -m bench run --out"),
        (["report", str(tmp_path / "empty")], "there are no results in"),
        (["run", "--out", str(tmp_path), "--only", "balanser"], "no case of preset quick has 'balanser' in its label"),
        (["run", "--out", str(tmp_path / "page.html"), "--only", "balancer"], "page.html"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
