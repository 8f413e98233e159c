"""What a run shows while it trains: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from tqdm import tqdm

from refimpl.kernels import tier
from refimpl.training.evaluate import perplexity
from refimpl.training.loop import Observer, Run
from refimpl.training.trainer import StepResult

RECENT = 50
"""Steps over which the loss and the speed that are shown are averaged."""

SECONDS_BETWEEN_LINES = 10.0
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
WORTH_SAYING = 1.0
"""Seconds of compilation below which nothing is said."""


def compile_seconds() -> float:
    """Return the time that this process has spent on compiling kernels or loading them from the cache."""
    if not tier().__name__.endswith("cpu"):
        return 0.0
    from refimpl.kernels.cpu import runtime

    return runtime.compile_seconds


class Progress(Observer):
    """Shows a run: one line on stdout for each epoch, and in between a bar on stderr, or lines without a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=RECENT)  # time, samples, loss
        self._said_at = time.monotonic()
        self._compiled = compile_seconds()

    def started(self, run: Run) -> None:
        """Draw the bar."""
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=run.total_steps, initial=run.state.step, file=sys.stderr, unit="step", dynamic_ncols=True,
                smoothing=0.05, bar_format=BAR,
            )  # fmt: skip
            self._bar.set_description_str(_epoch(run))
        self._said_at = time.monotonic()
        self._recent.clear()

    def stepped(self, run: Run, result: StepResult) -> None:
        """Move the bar, or write a line now and then."""
        now = time.monotonic()
        first = not self._recent
        self._recent.append((now, run.samples, result.loss))
        if first or compile_seconds() - self._compiled > WORTH_SAYING:
            self._say_compilation()
        if self._bar is not None:
            self._bar.set_description_str(_epoch(run), refresh=False)
            self._bar.set_postfix_str(self._facts(run), refresh=False)
            self._bar.update()
        elif now - self._said_at > SECONDS_BETWEEN_LINES:
            step = f"step {run.state.step:,} of {run.total_steps:,}"
            self._say(f"{_epoch(run)}, {step}, {self._facts(run)}, {self._left(run)} left")
            self._said_at = now

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Write the epoch's line."""
        measure = run.task.measure
        score = record[f"valid_{measure}"]
        value = f"{score:.4f}" if measure == "accuracy" else f"{score:.1f}"
        self._say(
            f"epoch {record['epoch']} of {run.config.training.epochs}: train loss {record['train_loss']:.3f}, "
            f"validation loss {record['valid_loss']:.3f}, validation {measure} {value}, "
            f"{self._speed(run)}{', averaging' if record['averaging'] else ''}{_exchanged(record['exchanged'])}"
        )
        if record["trigger"]:
            self._say("the validation loss no longer falls: weights are averaged from here on")
        self._recent.clear()  # so that the time of the evaluation does not count as a step's
        self._said_at = time.monotonic()

    def finished(self, run: Run) -> None:
        """Take the bar away."""
        self._say_compilation()
        self.close()

    def close(self) -> None:
        """Take the bar away, also after an error; may be called twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _facts(self, run: Run) -> str:
        loss = sum(loss for *_, loss in self._recent) / len(self._recent)
        measure = f", perplexity {perplexity(loss):.1f}" if run.task.measure == "perplexity" else ""
        return f"loss {loss:.3f}{measure}, {self._speed(run)}"

    def _speed(self, run: Run) -> str:
        if len(self._recent) < 2:
            return f"- {run.task.unit}/s"
        (begun, before, _), (ended, after, _) = self._recent[0], self._recent[-1]
        return f"{(after - before) / max(ended - begun, 1e-9):,.0f} {run.task.unit}/s"

    def _left(self, run: Run) -> str:
        if len(self._recent) < 2:
            return "?"
        per_step = (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)
        return str(tqdm.format_interval((run.total_steps - run.state.step) * per_step))

    def _say_compilation(self) -> None:
        took = compile_seconds() - self._compiled
        if took > WORTH_SAYING:
            self._say(f"kernels took {took:.1f} s to compile or load")
            self._compiled += took

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)


def _epoch(run: Run) -> str:
    return f"epoch {min(run.state.epoch + 1, run.config.training.epochs)}/{run.config.training.epochs}"


def _exchanged(counts: dict[str, dict[str, int]]) -> str:
    """Return how many weights the exchange at the end of the epoch moved, if there was one."""
    if not counts:
        return ""
    dropped, grown = (sum(of[kind] for of in counts.values()) for kind in ("dropped", "grown"))
    if dropped == grown:
        return f", {dropped:,} weights exchanged"
    moves = [f"{count:,} {kind}" for count, kind in ((dropped, "dropped"), (grown, "grown")) if count]
    return f", weights: {', '.join(moves)}"
