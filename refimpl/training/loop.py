"""The training loop: epochs of batches, validation, trigger, exchange, metrics, checkpoints.

A run that was stopped at any moment, by Ctrl-C, by a kill or by a power cut, resumes from its last checkpoint and comes
to the same bits as one that never stopped.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from refimpl.kernels import threads
from refimpl.optim import triggered
from refimpl.training import checkpoint, flops, twin
from refimpl.training.build import make_learning_rate, make_method, make_optimizers
from refimpl.training.config import Config
from refimpl.training.corpora import open_corpus
from refimpl.training.metrics import MetricsWriter
from refimpl.training.run_folder import RunFolder
from refimpl.training.state import State, pack, unpack
from refimpl.training.task import Batch, Data, make_task
from refimpl.training.trainer import NonFiniteLossError, StepResult, Trainer
from refimpl.weights import Exchange, Params, SparseWeight, density_of

log = logging.getLogger(__name__)

STEPS_BETWEEN_RECORDS = 20


class Observer:
    """Watches a run; by default it does nothing."""

    def started(self, run: Run) -> None:
        """The run is about to take its first step, or the first after a resume."""

    def stepped(self, run: Run, result: StepResult) -> None:
        """A training step was taken."""

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """An epoch has ended; ``record`` is what the metrics file gets."""

    def finished(self, run: Run) -> None:
        """The run has come to its end, or was asked to stop."""


class Run:
    """A run: a configuration, a corpus (a text, or images) and a state that moves, with or without a folder.

    Parameters
    ----------
    config : Config
    corpus : Corpus or Images, optional
        By default the one that the configuration names.
    folder : RunFolder, optional
        Where metrics and checkpoints go; without it nothing is written. If it holds checkpoints, the run goes on from
        the newest.

    Raises
    ------
    ValueError
        If the corpus is not of the task's kind, or shorter than one batch or window, the method does not fit the
        model, or the folder's data or checkpoint belong to another run.
    """

    def __init__(self, config: Config, corpus: Data | None = None, folder: RunFolder | None = None) -> None:
        self.config = config
        self.corpus = open_corpus(config) if corpus is None else corpus
        self.folder: RunFolder | None = None
        options = config.training
        self.task = make_task(config, self.corpus)
        self.steps_per_epoch = self.task.steps_per_epoch
        whole = options.epochs * self.steps_per_epoch
        self.total_steps = min(whole, options.max_steps) if options.max_steps else whole
        optimizer, averaging = make_optimizers(config)
        method = make_method(config, self.total_steps, self.steps_per_epoch)
        self.trainer = Trainer.begin(
            self.task.model,
            method,
            optimizer,
            make_learning_rate(config, self.steps_per_epoch, method.horizon(self.total_steps)),
            probe=self.task.probe(),
            steps_per_epoch=self.steps_per_epoch,
            batch=options.batch_size,
            dtype=np.dtype(config.dtype),
            seed=config.seed,
            averaging=averaging,
            clip=config.optimizer.clip,
        )
        self.seconds = 0.0  # spent in training steps by this process
        self.samples = 0  # trained on by this process
        self.stop_asked = False
        self._metrics: MetricsWriter | None = None
        self._saved_step = -1
        if folder is not None:
            self.attach(folder)

    def attach(self, folder: RunFolder) -> None:
        """Write metrics and checkpoints into ``folder`` from now on; if it holds checkpoints, go on from the newest.

        So a run can be built, and all that is wrong with it be found, before a folder is made for it.

        Raises
        ------
        ValueError
            If the folder's data or checkpoint belong to another run, or all its checkpoints are damaged.
        """
        folder.check_data(self.corpus.sha256)
        self.folder = folder
        self._resume(folder)

    @property
    def state(self) -> State:
        """The state that moves."""
        return self.trainer.state

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.state.step >= self.total_steps

    def train(self, observer: Observer | None = None) -> Literal["finished", "stopped"]:
        """Train to the end, or until :attr:`stop_asked` is set.

        Raises
        ------
        NonFiniteLossError
            If the loss became infinite or NaN; the state of before is saved as ``checkpoints/not-finite.npz``.
        """
        observer = observer or Observer()
        if self.config.training.threads:
            threads.set_count(self.config.training.threads)
        with threads.one_blas_thread():
            observer.started(self)
            while not self.done and not self.stop_asked:
                self._train_batch(observer)
                ended = self.state.window == self.steps_per_epoch or self.done
                if ended:
                    self._end_epoch(observer)
                every = self.config.training.checkpoint_every
                if ended or (every and self.state.step % every == 0):
                    self._save()
            if self.stop_asked and self._saved_step != self.state.step:
                self._save()
            observer.finished(self)
        return "finished" if self.done else "stopped"

    @property
    def batches(self) -> Sequence[Batch]:
        """The (inputs, targets) of the epoch that is under way, in order."""
        return self.task.batches(self.state.epoch - self.state.origin_epoch)

    def _train_batch(self, observer: Observer) -> None:
        inputs, targets = self.batches[self.state.window]
        start = time.perf_counter()
        try:
            result = self.trainer.step(inputs, targets)
        except NonFiniteLossError as error:
            where = self._save_not_finite()
            raise NonFiniteLossError(f"{error}{where}") from None
        self.seconds += time.perf_counter() - start
        self.samples += targets.size
        step = self.state.step
        if step % STEPS_BETWEEN_RECORDS == 0:
            record = {
                "kind": "step",
                "step": step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": self._lr(),
            }
            self._record(record)
        if result.exchanges:
            self._record({"kind": "exchange", "step": step, "weights": exchange_counts(result.exchanges)})
        observer.stepped(self, result)

    def _end_epoch(self, observer: Observer) -> None:
        trainer, state = self.trainer, self.state
        evaluated = trainer.evaluated()
        scores = self.task.evaluate(evaluated, "valid")
        loss = scores["loss"]
        # A model that is still denser than was asked for is kept only until the next one.
        if loss < state.best or not state.settled:
            state.best = loss
            self._save_best(checkpoint.pack_params(evaluated, {}), loss, state.epoch + 1)
        if trainer.method.dense_twin(state.step) and loss < state.best_dense:
            state.best_dense = loss
            self._save_best_dense(evaluated, scores)
        state.settled = trainer.method.settled(state.step)
        fires = self.fires(loss)
        record = {
            "kind": "epoch",
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_loss": state.loss_sum / max(state.loss_count, 1),
            **{f"valid_{name}": value for name, value in scores.items()},
            "lr": self._lr(),
            "averaging": state.averaging,
            "trigger": fires,
            "flops": flops.total(state.flops["executed"]),
            "flops_terms": dict(state.flops["executed"]),
            "density": {
                name: density_of(w)
                for name, w in trainer.method.view(state.params).items()
                if trainer.specs[name].prunable
            },
            "gate_density": self.gate_densities(),
        }
        exchanges = self.next_epoch(loss, fires=fires)
        record["exchanged"] = exchange_counts(exchanges)
        speed = {f"{self.task.unit}_per_second": self.samples / max(self.seconds, 1e-9)}
        self._record({**record, "seconds": self.seconds, **speed})
        observer.evaluated(self, record)

    def fires(self, loss: float) -> bool:
        """Tell whether averaging is to begin after an epoch that ended with this validation loss."""
        if self.state.averaging or self.trainer.averaging_optimizer is None:
            return False
        return triggered(self.state.history, loss, self.config.optimizer.nonmono)

    def next_epoch(self, loss: float, *, fires: bool) -> dict[str, Exchange]:
        """Begin averaging if it is to, exchange, and begin the next epoch, after one with this validation loss."""
        if fires:
            self.trainer.start_averaging()
        elif not self.state.averaging:
            self.state.history.append(loss)
        return self.trainer.end_epoch(triggered=fires)

    def gate_densities(self) -> dict[str, dict[str, float]]:
        """Return the density of each named block of rows (the gates) of each sparse weight."""
        found: dict[str, dict[str, float]] = {}
        for name, weight in self.trainer.method.view(self.state.params).items():
            blocks = self.trainer.specs[name].blocks
            if blocks and isinstance(weight, SparseWeight):
                counts, columns = weight.support.row_counts, weight.support.matrix_shape[1]
                found[name] = {gate: float(counts[rows].mean() / columns) for gate, rows in blocks.items()}
        return found

    def _lr(self) -> float:
        state = self.state  # of the step just taken
        return self.trainer.learning_rate(state.step - 1 - state.origin_step, state.epoch - state.origin_epoch)

    # --- files

    def _record(self, record: dict[str, Any]) -> None:
        if self.folder is not None:
            if self._metrics is None:
                self._metrics = MetricsWriter(self.folder.metrics_path)
            self._metrics.append(record)

    def _save(self) -> None:
        if self.folder is not None:
            if self._metrics is None:
                self._metrics = MetricsWriter(self.folder.metrics_path)
            self._metrics.sync()
            arrays, meta = pack(self.state, self.trainer.method)
            self.folder.save(self.state.step, arrays, {**meta, "metrics_length": self._metrics.length})
            self._saved_step = self.state.step

    def save_as_it_is(self, best: dict[str, np.ndarray], loss: float) -> None:
        """Save the state of a run that begins with one from elsewhere, and the arrays of its best model for now."""
        self._save_best(best, loss, self.state.epoch)
        self._save()

    def _save_best(self, best: dict[str, np.ndarray], loss: float, epoch: int) -> None:
        if self.folder is not None:
            self.folder.save_best(self.state.step, best, {"valid_loss": loss, "epoch": epoch})

    def _save_best_dense(self, evaluated: Params, scores: dict[str, float]) -> None:
        if self.folder is not None:
            arrays, meta = twin.pack(self.state, self.trainer.method, evaluated)
            self.folder.save_best_dense(self.state.step, arrays, {**meta, "valid": scores})

    def _save_not_finite(self) -> str:
        if self.folder is None:
            return ""
        path = self.folder.checkpoints_path / "not-finite.npz"
        path.parent.mkdir(exist_ok=True)
        checkpoint.save(path, *pack(self.state, self.trainer.method))
        return f"; the state is in {str(path)!r}"

    def _resume(self, folder: RunFolder) -> None:
        found = folder.latest_valid()
        self._metrics = MetricsWriter(folder.metrics_path)
        if found is None:
            self._metrics.truncate(0)
            return
        unpack(self.state, self.trainer.method, found.arrays, found.meta)
        self._saved_step = self.state.step
        self._metrics.truncate(found.meta["metrics_length"])

    def close(self) -> None:
        """Close the metrics file and give back the folder's lock."""
        if self._metrics is not None:
            self._metrics.close()
        if self.folder is not None:
            self.folder.close()


def exchange_counts(exchanges: dict[str, Exchange]) -> dict[str, dict[str, int]]:
    """Return how many entries of each weight were dropped, grown, and of these grown back."""
    return {name: exchange.counts() for name, exchange in exchanges.items()}


@contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """Let Ctrl-C and a polite kill end the run at the next step boundary; a second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if run.stop_asked:
            raise KeyboardInterrupt
        run.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
