"""How far an evaluation is and how fast: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from trainer.bars import LINE_EVERY
from trainer.evaluation.parts import Finished
from trainer.units import duration

SILENCE = 300.0  # seconds without a batch that are worth a word


class Meter:
    """Counts what was finished since the start or restart.

    Args:
        before: records that were done already.
        total: records in all; 0 is not known yet.
    """

    def __init__(self, before: int, total: int) -> None:
        self.before, self.total = before, total
        self.samples = 0
        self.waiting_for: list[int] = []  # ranks, once others have ended
        self._prompt = self._padded = self._generated = 0
        self._started = self._latest = time.monotonic()

    @property
    def done(self) -> int:
        return self.before + self.samples

    @property
    def silence(self) -> float:
        """Seconds since a batch was finished, or since the start."""
        return time.monotonic() - self._latest

    def add(self, finished: Finished) -> None:
        self._latest = time.monotonic()
        self.samples += len(finished.results)
        self._prompt += finished.prompt_tokens
        self._padded += finished.padded_tokens
        self._generated += finished.generated_tokens

    def rates(self) -> str:
        """Samples and generated tokens a second, share of padding, and the time left; where it stands still, who does.

        Empty before the first batch.
        """
        speed = [self._speed()] if self.samples else []
        if self.waiting_for:
            speed.append(f"waiting for rank {', '.join(map(str, self.waiting_for))}")
        if self.total and self.silence >= SILENCE:
            speed.append(f"no batch has ended for {duration(self.silence)}")
        return ", ".join(speed)

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = self.samples / seconds
        left = tqdm.format_interval((self.total - self.done) / speed)
        tokens = (self._generated or self._prompt) / seconds  # nothing is generated for losses
        padding = 1 - self._prompt / self._padded
        return (
            f"{speed:.1f} samples/s, {tokens:,.0f} tokens/s, padding {padding:.0%}, {left} left"
        )  # fmt: skip


class Display:
    """Shows a meter on stderr; used as the ``report`` of an evaluation."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._tty = sys.stderr.isatty()
        self._last = time.monotonic()
        self._final = ""

    def __call__(self, meter: Meter) -> None:
        if not meter.total:
            return
        rates = meter.rates()
        self._final = f"{meter.done:,} of {meter.total:,} samples" + (f", {rates}" if rates else "")
        if self._tty:
            if self._bar is None:
                shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
                self._bar = tqdm(total=meter.total, initial=meter.before, bar_format=shape)
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(meter.done - self._bar.n)
        elif time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            print(self._final, file=sys.stderr, flush=True)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._final and kind is None:
            print(self._final, file=sys.stderr, flush=True)
