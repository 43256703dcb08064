"""What is measured: sizes, modes and the presets that put them together.

Legend: M positions, N supervised positions, D hidden width, V vocabulary, K tasks; F = 2 N V D flop, one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# mode -> matrix products of the cheapest exact algorithm, in units of F.
PRODUCTS = {"loss": 1, "forward": 1, "backward": 0, "train": 3, "frozen_head": 2}
MODES = {
    "loss": "loss alone, no gradients",
    "forward": "forward pass with gradients wanted",
    "backward": "backward pass alone",
    "train": "forward and backward",
    "frozen_head": "forward and backward, weight frozen",
}
# Share of supervised positions in LLaVA-1.5's instruction data: 576 image tokens, a prompt, and a short answer.
LLAVA_SHARE = 0.12


@dataclass(frozen=True)
class Head:
    """A published language-model head."""

    name: str
    V: int
    D: int


HEADS = {
    head.name: head
    for head in (
        Head("Llama-3", 128256, 4096),
        Head("Qwen2.5", 152064, 3584),
        Head("Gemma-2", 256000, 2304),
        Head("LLaVA-1.5", 32000, 4096),
        Head("SmolLM2", 49152, 576),
        Head("LLaVA-1.5, D/8", 32000, 512),  # sizes that a CPU can wait for
        Head("SmolLM2, V/6", 8192, 576),
    )
}


@dataclass(frozen=True)
class LinearCase:
    """The loss of a linear head. ``tasks`` > 0 asks for Eq. 2 with that many task weights, 0 for plain means."""

    head: str
    M: int
    supervised: float = 1.0
    tasks: int = 0
    mode: str = "train"
    dtype: str = "bfloat16"
    memory: bool = True
    suite: str = field(default="linear", init=False)

    def __post_init__(self) -> None:
        if self.mode not in PRODUCTS:
            raise ValueError(f"mode must be one of {', '.join(PRODUCTS)}, got {self.mode!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def V(self) -> int:
        return HEADS[self.head].V

    @property
    def D(self) -> int:
        return HEADS[self.head].D

    @property
    def N(self) -> int:
        """Supervised positions; the problem is made with exactly so many."""
        return max(1, round(self.M * self.supervised))

    @property
    def flops(self) -> float:
        """Flop that the mode needs: products of supervised rows only."""
        return PRODUCTS[self.mode] * 2.0 * self.N * self.V * self.D

    @property
    def traffic(self) -> int:
        """Bytes that cannot be avoided: inputs read once and gradients written once."""
        element = DTYPES[self.dtype].itemsize
        read = (self.V * self.D + self.N * self.D) * element + 8 * self.M
        written = self.M * self.D * element if self.mode not in ("loss", "forward") else 0
        if self.mode in ("backward", "train"):
            written += self.V * self.D * element
        return read + written

    @property
    def label(self) -> str:
        parts = [f"{self.head} {self.V}x{self.D}", f"M={self.M}", f"{self.supervised:.0%} supervised", self.dtype]
        if self.tasks:
            parts.append(f"{self.tasks} task weights")
        return ", ".join([*parts, MODES[self.mode]])


@dataclass(frozen=True)
class LogitsCase:
    """The loss of logits that exist."""

    M: int
    V: int
    supervised: float = 1.0
    tasks: int = 0
    dtype: str = "bfloat16"
    suite: str = field(default="logits", init=False)

    @property
    def N(self) -> int:
        return max(1, round(self.M * self.supervised))

    @property
    def traffic(self) -> int:
        """Bytes: supervised logits read once, the whole gradient written once."""
        return (self.N + self.M) * self.V * DTYPES[self.dtype].itemsize

    @property
    def label(self) -> str:
        weights = f", {self.tasks} task weights" if self.tasks else ""
        return (
            f"logits {self.M}x{self.V}, {self.supervised:.0%} supervised, {self.dtype}{weights}, forward and backward"
        )


@dataclass(frozen=True)
class BalancerCase:
    """One step of the convergence balancer: K tasks, a window of validation losses."""

    tasks: int
    window: int
    suite: str = field(default="balancer", init=False)

    @property
    def label(self) -> str:
        return f"convergence balancer, {self.tasks} tasks, window {self.window}"


@dataclass(frozen=True)
class ModelCase:
    """A LLaVA-shaped model: sequences of image tokens, a prompt and an answer, of which only the answer is supervised.

    LLaVA-1.5 has 576 image tokens (24 x 24 patches of 14 pixels); prompt and answer lengths are chosen so that
    12 % of the positions are supervised, as in its data.
    """

    name: str
    V: int
    D: int
    layers: int
    heads: int
    batch: int
    patches: int  # along one side of the square image
    prompt: int
    answer: int
    tasks: int
    dtype: str
    train: bool = True
    memory: bool = True
    suite: str = field(default="model", init=False)

    @property
    def sequence(self) -> int:
        return self.patches**2 + self.prompt + self.answer

    @property
    def supervised(self) -> float:
        return self.answer / self.sequence

    @property
    def label(self) -> str:
        what = "training step" if self.train else "evaluation of losses"
        return (
            f"{what}, {self.name}: {self.batch} sequences of {self.patches**2} image + {self.prompt} prompt + "
            f"{self.answer} answer tokens, {self.layers} layers of width {self.D}, V={self.V}, {self.dtype}"
        )


Case = LinearCase | LogitsCase | BalancerCase | ModelCase


@dataclass(frozen=True)
class Preset:
    """Cases in the order of their importance, and how long to stay with each."""

    name: str
    device: str
    cases: tuple[Case, ...]
    rounds: int = 9
    warmup: int = 1  # rounds; each variant has run once before, when it was compared with float64
    seconds_per_variant: float = 1.0  # of timed rounds of a case; at least three rounds are taken
    minutes: float = math.inf  # cases that would start later are listed as not run
    # What a peer may take at a time, compiling and tuning included, before it counts as hanging. A process that
    # measures its memory on a CPU may take twice five minutes.
    turn_seconds: float = 900.0


def _linear(head: str, M: int, **changes: object) -> LinearCase:
    return replace(LinearCase(head, M), **changes)  # type: ignore[arg-type]


def _h200() -> Preset:
    llama = "Llama-3"
    # The two sizes that the project has targets for come first, so that no lack of time leaves them out.
    cases: list[Case] = [_linear(llama, 8192)]
    cases += [_linear(llama, M, supervised=LLAVA_SHARE) for M in (8192, 16384)]
    cases += [_linear(llama, M) for M in (1024, 2048, 4096, 16384)]
    cases += [_linear(llama, 8192, supervised=share) for share in (0.25, 0.05)]
    cases += [_linear(llama, 8192, mode=mode) for mode in ("loss", "frozen_head", "forward", "backward")]
    cases += [_linear(llama, 8192, supervised=LLAVA_SHARE, tasks=tasks) for tasks in (1, 8, 64)]
    cases += [_linear(head, 8192) for head in ("Qwen2.5", "Gemma-2", "LLaVA-1.5", "SmolLM2")]
    cases += [_linear(head, 8192, supervised=LLAVA_SHARE) for head in ("Qwen2.5", "Gemma-2", "LLaVA-1.5", "SmolLM2")]
    cases += [
        LogitsCase(8192, 128256),
        LogitsCase(8192, 128256, supervised=LLAVA_SHARE, tasks=8),
        BalancerCase(8, 40),
        BalancerCase(64, 200),
        ModelCase("1.2B", 128256, 2048, 16, 32, 8, 24, 64, 87, 8, "bfloat16"),
        ModelCase("1.2B", 128256, 2048, 16, 32, 8, 24, 64, 87, 8, "bfloat16", train=False),
    ]
    cases += [_linear(llama, 32768), _linear(llama, 65536)]
    cases += [_linear("LLaVA-1.5", 4096, dtype=dtype) for dtype in ("float32", "float16")]
    # What is under way when the time is over still has to finish.
    return Preset("h200", "cuda", tuple(cases), 15, 1, seconds_per_variant=0.25, minutes=8.0, turn_seconds=120.0)


def _cpu() -> Preset:
    main, small = "LLaVA-1.5, D/8", "SmolLM2"
    # Memory costs a fresh process for every peer: of three cases only.
    measured, float32 = {"dtype": "float32"}, {"dtype": "float32", "memory": False}
    cases: list[Case] = [
        _linear(main, 2048, **measured),
        _linear(main, 2048, supervised=LLAVA_SHARE, **measured),
        _linear(small, 512, **float32),
        _linear(small, 512, supervised=LLAVA_SHARE, **float32),
        _linear(main, 1024, supervised=LLAVA_SHARE, tasks=8, **float32),
        *(_linear(main, M, supervised=LLAVA_SHARE, **float32) for M in (256, 512, 1024)),
        *(_linear(main, 512, supervised=share, **float32) for share in (1.0, 0.25, 0.05)),
        *(_linear(main, 512, mode=mode, **float32) for mode in ("loss", "forward", "backward", "frozen_head")),
        _linear(main, 512, supervised=LLAVA_SHARE, dtype="bfloat16", memory=False),
        LogitsCase(512, 32000, dtype="float32"),
        LogitsCase(512, 32000, LLAVA_SHARE, 8, "float32"),
        BalancerCase(8, 40),
        ModelCase("small", 32000, 256, 4, 8, 2, 12, 24, 23, 8, "float32"),
        ModelCase("small", 32000, 256, 4, 8, 2, 12, 24, 23, 8, "float32", train=False, memory=False),
    ]
    return Preset("cpu", "cpu", tuple(cases), rounds=7, warmup=0, seconds_per_variant=1.0)


def _quick() -> Preset:
    head = "SmolLM2, V/6"
    float32 = {"dtype": "float32", "memory": False}
    cases: tuple[Case, ...] = (
        _linear(head, 512, **float32),
        _linear(head, 512, supervised=LLAVA_SHARE, **float32),
        *(_linear(head, 512, mode=mode, **float32) for mode in ("loss", "forward", "backward", "frozen_head")),
        _linear(head, 512, supervised=LLAVA_SHARE, tasks=8, **float32),
        LogitsCase(256, 8192, dtype="float32"),
        LogitsCase(256, 8192, LLAVA_SHARE, 8, "float32"),
        BalancerCase(8, 40),
        ModelCase("tiny", 8192, 128, 2, 4, 2, 8, 12, 10, 4, "float32", memory=False),
        ModelCase("tiny", 8192, 128, 2, 4, 2, 8, 12, 10, 4, "float32", train=False, memory=False),
    )
    return Preset("quick", "cpu", cases, rounds=5, warmup=0, seconds_per_variant=0.4)


PRESETS = {preset.name: preset for preset in (_quick(), _cpu(), _h200())}
