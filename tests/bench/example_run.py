"""A run with every kind of entry, whose numbers can be recognised in a report."""

from bench.results import Entry, Row, Run


def example_run() -> Run:
    case = {"head": "LLaVA-1.5", "M": 2048, "V": 32000, "D": 512, "N": 246, "supervised": 0.12, "tasks": 0}
    case |= {"mode": "train", "dtype": "float32", "memory": True}
    ours = Entry(
        "cotbal",
        "ok",
        version="0.1.0",
        seconds=[0.011, 0.0125, 0.013],
        samples=[0.011, 0.0125, 0.013],
        ratio=[1.0, 1.0, 1.0],
        memory=3 * 2**20,
        deviations={"loss": 1e-8, "weight": 4.2e-7},
        allowed={"loss": 1e-5, "weight": 1e-5},
    )
    eager = Entry(
        "eager",
        "ok",
        version="2.13",
        seconds=[0.09, 0.0975, 0.1],
        samples=[0.09, 0.0975, 0.1],
        ratio=[7.5, 7.8, 8.1],
        memory=512 * 2**20,
        deviations={"loss": 1e-8, "weight": 6.1e-7},
        allowed={"loss": 1e-5, "weight": 1e-5},
    )
    liger = Entry("liger", "unavailable", "liger-kernel is not installed (bench/peers.txt)")
    broken = Entry("broken", "failed", "RuntimeError: a | b went wrong", "9.9")
    linear = Row(
        "linear",
        "LLaVA-1.5 32000x512, M=2048",
        case,
        [eager, ours, liger, broken],
        flops=2.4e10,
        traffic=2**27,
        products=[0.009, 0.01, 0.011],
        bandwidth=2e9,
    )
    logits = Row("logits", "logits 64x99", {}, [Entry("eager", "ok", seconds=[0.003] * 3)], traffic=3_000_000)
    logits.bandwidth = 2e9
    late = Row("linear", "a late case", {**case, "M": 4096}, [], skipped="out of time")
    larger = Row("linear", "LLaVA-1.5 32000x512, M=1024", {**case, "M": 1024}, [ours, eager], products=[0.009] * 3)
    environment = {
        "device": "Example Processor",
        "kind": "cpu",
        "cores": 2,
        "threads": 2,
        "load": 0.1,
        "clocks": None,
        "python": "3.11.4",
        "versions": {"torch": "2.13.0", "liger-kernel": None},
        "commit": "0123456789ab",
    }
    return Run(
        "cpu",
        "python -m bench run --preset cpu",
        "2026-01-02T03:04:05+00:00",
        environment,
        [linear, logits, late, larger],
    )
