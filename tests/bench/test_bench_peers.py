"""The list of peers, one case from beginning to end, and memory measured in a process of its own."""

import ast
import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import replace
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import bench.peers
from bench import balancer, linear, memory, model, record
from bench.cases import HEADS, PRESETS, BalancerCase, Head, LinearCase, LogitsCase, ModelCase
from bench.peers import MATERIALISED, OURS, all_peers, by_name
from bench.peers.base import Peer, UnsupportedError, Weighting, needs_cuda
from bench.peers.eager import Eager
from bench.problems import make
from bench.timing import Spread
from cotbal_kernels import linear_task_cross_entropy

CPU = torch.device("cpu")
PRESET = replace(PRESETS["quick"], rounds=3, warmup=1, seconds_per_variant=0.0)


@pytest.fixture(autouse=True)
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "odd", Head("odd", 517, 37))


class Wrong(Eager):
    """The sum instead of the mean."""

    name = "wrong"

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        return super().loss(hidden_MD, weight_VD, labels_M, weighting) * (labels_M >= 0).sum()


class Tiring(Eager):
    """Right when it is checked, out of memory when it is timed."""

    name = "tiring"
    calls = 0

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise torch.OutOfMemoryError("no more")
        return super().loss(hidden_MD, weight_VD, labels_M, weighting)


def test_every_peer_is_listed_whether_it_can_run_or_not() -> None:
    names = [peer.name for peer in all_peers()]
    assert len(set(names)) == len(names)
    assert names[0] == OURS
    assert MATERIALISED in names
    packages = {peer.package for peer in all_peers()} - {None}
    assert packages == {"cut-cross-entropy", "liger-kernel", "quack-kernels"}
    on_cpu = {peer.name: peer.unavailable(CPU) for peer in all_peers()}
    assert on_cpu["quack"] in ("quack-kernels is not installed (bench/peers.txt)", "runs on CUDA devices only")
    # At least four peers run on a CPU without anything installed beside torch.
    assert sum(reason is None for name, reason in on_cpu.items() if name != OURS) >= 4
    pinned = (Path(bench.peers.__file__).parent.parent / "peers.txt").read_text()
    for package in packages:
        assert f"\n{package}==" in pinned


def test_modules_import_one_another_in_one_direction_only() -> None:
    root = Path(bench.peers.__file__).parent.parent
    imports: dict[str, set[str]] = {}
    for path in root.glob("*.py"):
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "bench"):
                module = (node.module or "").removeprefix("bench").removeprefix(".")
                found |= {module} if module else {alias.name for alias in node.names}
        imports[path.stem] = {name for name in found if (root / f"{name}.py").exists()}
    assert imports["memory_process"] == {"cases", "linear", "model", "problems"}
    tuple(TopologicalSorter(imports).static_order())  # a circle is an error that names it


def test_all_logits_at_once_is_the_same_loss() -> None:
    peer = by_name("cotbal (all logits)")
    assert peer.unavailable(CPU) == "runs on CUDA devices only"
    assert type(peer).loss_of_logits is Peer.loss_of_logits
    problem = make(LinearCase("odd", 50, 0.3, 3, dtype="float32"), CPU)
    inputs = (problem.scores, problem.weight_VD, problem.labels_M, problem.weighting)
    seen: list[int] = []
    with mock.patch("bench.peers.cotbal.linear_task_cross_entropy", wraps=linear_task_cross_entropy) as called:
        torch.testing.assert_close(peer.loss(*inputs), Eager().loss(*inputs))  # type: ignore[arg-type]
        seen.append(called.call_args.kwargs["chunk_size"])
    assert seen[0] >= 50


def test_packages_are_imported_only_when_they_are_used() -> None:
    for found in pkgutil.iter_modules(bench.peers.__path__):
        module = importlib.import_module(f"bench.peers.{found.name}")
        assert not {"liger_kernel", "quack", "cut_cross_entropy"} & set(vars(module))


def test_a_case_from_beginning_to_end() -> None:
    case = LinearCase("odd", 50, 0.3, dtype="float32", memory=False)
    peers: list[Peer] = [*(peer for peer in all_peers() if "compile" not in peer.name), Wrong(), Tiring()]
    row = linear.measure(case, PRESET, CPU, peers)
    assert [entry.name for entry in row.entries] == [peer.name for peer in peers]
    assert {entry.name: entry.error for entry in row.entries if entry.status == "failed"} == {
        "wrong": row.entry("wrong").error,  # type: ignore[union-attr]
        "tiring": "OutOfMemoryError: no more",
    }
    wrong = row.entry("wrong")
    assert wrong is not None
    assert wrong.error is not None
    assert wrong.error.startswith("computes another function: loss is off by 1.4e+01")  # 15 rows: 15 times the mean
    assert wrong.seconds is None  # not timed
    ours, eager = row.entry(OURS), row.entry(MATERIALISED)
    assert ours is not None
    assert eager is not None
    assert ours.version == version("cotbal")
    assert len(eager.samples) == 3
    ratios = [other / own for other, own in zip(eager.samples, ours.samples, strict=True)]
    # Samples are kept with five digits.
    assert eager.seconds == pytest.approx(record.as_list(Spread.of(eager.samples)), rel=1e-4)
    assert eager.ratio == pytest.approx(np.percentile(ratios, [25, 50, 75]).tolist(), rel=1e-3)
    assert row.case["V"] == 517
    assert row.products is not None
    assert row.bandwidth is not None


def test_modes_time_what_they_say() -> None:
    """Work per call: no graph in "loss", none executed in "forward", only its execution in "backward"."""
    seen: list[str] = []

    class Spy(Eager):
        def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
            value = super().loss(hidden_MD, weight_VD, labels_M, weighting)
            seen.append("graph" if value.requires_grad else "no graph")
            if value.requires_grad:
                value.register_hook(lambda _: seen.append("backward"))
            return value

    expected = {
        "loss": ([], ["no graph"]),
        "forward": ([], ["graph"]),
        "backward": (["graph"], ["backward"]),
        "train": ([], ["graph", "backward"]),
        "frozen_head": ([], ["graph", "backward"]),
    }
    for mode, (before, timed) in expected.items():
        case = LinearCase("odd", 9, mode=mode, dtype="float32")
        problem = linear.make(case, CPU)
        variant = linear.variant_of(Spy(), problem, case)
        prepared = variant.prepare()
        assert seen == before, mode
        seen.clear()
        variant.run(prepared)
        assert seen == timed, mode
        seen.clear()
        assert (problem.weight_VD is not None and problem.weight_VD.grad is not None) == (mode in ("backward", "train"))


def test_balancer_is_compared_with_the_host_and_a_wrong_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BalancerCase(5, 12)
    row = balancer.measure(case, PRESET, CPU)
    ours = row.entry(OURS)
    assert ours is not None
    assert ours.status == "ok", ours.error
    assert ours.deviations is not None
    assert ours.deviations["weights"] <= balancer.TOLERANCE
    assert ours.seconds is not None
    monkeypatch.setattr(balancer.HostBalancer, "_slope", lambda self: np.ones(self.num_tasks))
    wrong = balancer.measure(case, PRESET, CPU).entry(OURS)
    assert wrong is not None
    assert wrong.status == "failed"
    assert "weights are off by" in str(wrong.error)


@pytest.mark.parametrize("train", [True, False])
def test_model_rows_compare_loss_and_both_ends_of_the_backward_pass(train: bool) -> None:
    case = ModelCase("tiny", 531, 32, 2, 4, 3, 3, 5, 4, 2, "float32", train=train, memory=False)
    row = model.measure(case, PRESET, CPU, [*(by_name(name) for name in (OURS, MATERIALISED)), Wrong()])
    found = {entry.name: entry for entry in row.entries}
    assert found["wrong"].status == "failed"
    for name in (OURS, MATERIALISED):
        assert found[name].status == "ok", found[name].error
        assert set(found[name].deviations or {}) == ({"loss", "head", "projector"} if train else {"loss"})
    ours = found[OURS]
    assert ours.seconds is not None
    assert ours.tokens_per_second == pytest.approx(3 * (9 + 5 + 4) / ours.seconds[1], rel=1e-4)


def test_llava_proportions() -> None:
    """12 % supervised within a percentage point, image tokens first, answers last, labels moved by one."""
    for preset in PRESETS.values():
        for case in preset.cases:
            if isinstance(case, ModelCase):
                assert case.supervised == pytest.approx(0.12, abs=0.01)
    case = ModelCase("tiny", 531, 32, 2, 4, 3, 3, 5, 4, 2, "float32")
    training = model.build(case, CPU)
    words_BS, labels_BS = training.inputs["input_ids"], training.labels_M.view(3, 18)
    assert (words_BS[:, :9] == 530).all()
    assert (words_BS[:, 9:] < 530).all()
    assert ((labels_BS >= 0).nonzero()[:, 1].view(3, 4) == torch.tensor([13, 14, 15, 16])).all()
    assert torch.equal(labels_BS[:, 13:17], words_BS[:, 14:])


def test_peak_of_a_process_is_what_the_step_allocates() -> None:
    """The materialised path in float32 holds the logits, the log-probabilities and their gradient at once, and no
    more than one other M x V beside them."""
    case = LinearCase("SmolLM2, V/6", 2048, dtype="float32")
    logits = 4 * 2048 * 8192
    # The resident set is counted in pages and includes what threads and libraries touch: 8 MiB of 64 are allowed.
    assert 2 * logits - 2**23 < memory.process_peak(MATERIALISED, case) < 4 * logits + 2**23


def test_a_measuring_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"the measuring process failed: .*there is no peer 'nobody'"):
        memory.process_peak("nobody", LinearCase("SmolLM2, V/6", 8, dtype="float32"))


def recorder(calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]]) -> Callable[..., Tensor]:
    """A function that writes down how it is called, and returns per-token losses or their mean."""

    def function(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append((tensors, options))
        losses_M = torch.ones(len(tensors[-1]))
        return losses_M if options.get("reduction") == "none" else losses_M.mean()

    return function


@pytest.mark.parametrize("weighted", [False, True])
def test_peers_are_called_as_their_documentation_says(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages, which need a GPU: what the pinned versions take, and what must be off."""
    calls: dict[str, list[tuple[tuple[Tensor, ...], dict[str, Any]]]] = {}
    places = {
        "cut_cross_entropy": ["linear_cross_entropy"],
        "liger_kernel": [],
        "liger_kernel.transformers": [],
        "liger_kernel.transformers.functional": ["liger_fused_linear_cross_entropy", "liger_cross_entropy"],
        "quack": [],
        "quack.linear_cross_entropy": ["chunked_linear_cross_entropy", "linear_cross_entropy_func"],
        "quack.cross_entropy": ["cross_entropy"],
    }
    for place, names in places.items():
        module = ModuleType(place)
        for name in names:
            setattr(module, name, recorder(calls.setdefault(name, [])))
        monkeypatch.setitem(sys.modules, place, module)
    case = LinearCase("odd", 9, tasks=2 if weighted else 0)
    problem = linear.make(case, CPU)
    for name in ("cut-cross-entropy", "liger", "liger (fp32 dW)", "quack"):
        linear.loss_of(by_name(name), problem)
    reduction = {"reduction": "none"} if weighted else {}
    assert calls["linear_cross_entropy"][0][1] == {"impl": "cce", "filter_eps": None, **reduction}
    assert [options for _, options in calls["liger_fused_linear_cross_entropy"]] == [
        {"accum_dtype": None, **reduction},
        {"accum_dtype": torch.float32, **reduction},
    ]
    if weighted:  # its chunked function has no reduction "none"
        ((tensors, options),) = calls["linear_cross_entropy_func"]
        assert tensors[2] is None
        assert options == {"reduction": "none"}
        assert not calls["chunked_linear_cross_entropy"]
    else:
        ((_, options),) = calls["chunked_linear_cross_entropy"]
        assert options == {"reduction": "mean"}  # chunk size and tuning are its own
    for name in ("linear_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_linear_cross_entropy"):
        for (hidden_MD, weight_VD, labels_M), _ in calls[name]:
            assert hidden_MD is problem.scores
            assert weight_VD is problem.weight_VD
            assert labels_M is problem.labels_M
    logits = linear.make(LogitsCase(9, 517, tasks=2 if weighted else 0), CPU)
    for name in ("liger", "quack"):
        linear.loss_of(by_name(name), logits)
    ((overwritten, _), _) = calls["liger_cross_entropy"][0]
    assert overwritten is not logits.scores  # it writes the gradient over its input, which is needed again
    assert calls["cross_entropy"][0][1] == {"reduction": "none" if weighted else "mean"}
    wide = linear.make(replace(case, dtype="float32"), CPU)
    with pytest.raises(UnsupportedError, match="16-bit hidden states only"):
        linear.loss_of(by_name("cut-cross-entropy"), wide)
    assert type(by_name("liger (fp32 dW)")).loss_of_logits is Peer.loss_of_logits


def test_a_package_that_cannot_be_imported_is_listed_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_peer.py").write_text("print('tried')\nraise TypeError('depends on a logger')\n")
    monkeypatch.syspath_prepend(tmp_path)
    tried: list[str] = []
    monkeypatch.setattr("builtins.print", tried.append)
    for _ in range(2):
        reason = needs_cuda("torch", "broken_peer", torch.device("cuda"))
        assert reason == "cannot be imported: TypeError: depends on a logger (bench/peers.txt)"
    assert tried == ["tried"]
    assert needs_cuda("torch", "broken_peer", CPU) == "runs on CUDA devices only"
