"""A whole training run against torch: the language model, clipping, the optimizers, windows, epochs and validation.

float64 throughout. After every step each parameter must agree to 1e-10 of its tensor's largest entry: rounding errors
grow along a trajectory, but not by six orders of magnitude in twenty steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from refimpl.datasets import batchify, windows
from refimpl.kernels import threads
from refimpl.testing.training import dense, tiny_config, tiny_corpus
from refimpl.training.loop import Observer, Run
from refimpl.training.trainer import StepResult, Trainer
from refimpl.weights import Exchange, SparseWeight

torch = pytest.importorskip("torch")

RELATIVE = 1e-10
STEPS = 20


@pytest.fixture(autouse=True)
def _plain_torch() -> Iterator[None]:
    """Averages of torch.optim.ASGD are scalars of the default type; float32 would round them."""
    before, count, theirs = torch.get_default_dtype(), threads.get(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(theirs)
    threads.set_count(count)


class Reference:
    """PyTorch's word-language-model example, fed as ours is.

    Parameters
    ----------
    run : Run
        Whose initial parameters, text and sizes it takes.
    make_optimizer : callable
        From a list of parameters to an optimizer.
    masks : dict of ndarray
        Entries that are kept at zero, and whose gradients too, before clipping.
    """

    def __init__(self, run: Run, make_optimizer: Callable[[Any], Any], masks: dict[str, np.ndarray]) -> None:
        shape = run.config.model
        self.run = run
        self.encoder = torch.nn.Embedding(run.corpus.vocabulary_size, shape.embedding_size)
        self.rnn = torch.nn.LSTM(shape.embedding_size, shape.hidden_size, shape.layers)
        self.decoder = torch.nn.Linear(shape.hidden_size, run.corpus.vocabulary_size)
        self.parameters = {
            f"{part}.{name}": p
            for part in ("encoder", "rnn", "decoder")
            for name, p in getattr(self, part).named_parameters()
        }
        assert set(self.parameters) == set(run.state.params)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(torch.from_numpy(dense(run.state.params[name])))
        self.masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
        self.optimizer = make_optimizer(list(self.parameters.values()))
        self.hidden: Any = None
        self.losses: list[float] = []

    def loss(self, tokens: np.ndarray, targets: np.ndarray, hidden: Any) -> tuple[Any, Any]:
        """Return the mean loss over a window, and the state after it."""
        out, hidden = self.rnn(self.encoder(torch.from_numpy(tokens).long()), hidden)
        logits = self.decoder(out).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long().flatten())
        return loss, tuple(h.detach() for h in hidden)

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Take one training step; return its loss."""
        self.optimizer.zero_grad()
        loss, self.hidden = self.loss(tokens, targets, self.hidden)
        loss.backward()
        for name, mask in self.masks.items():
            self.parameters[name].grad *= mask
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 0.25)
        self.optimizer.step()
        if (schedule := getattr(self.optimizer, "schedule", None)) is not None:
            schedule.step()
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.parameters[name] *= mask
        return float(loss.detach())

    def evaluated(self) -> dict[str, np.ndarray]:
        """Return the averages, or the parameters where there are none."""
        state = self.optimizer.state
        return {
            name: (state[p]["ax"] if "ax" in state[p] else p.detach()).numpy() for name, p in self.parameters.items()
        }

    def valid_loss(self) -> float:
        """Return the loss of the validation text, read in one window."""
        rows = batchify(self.run.corpus.valid, self.run.config.data.eval_batch_size)
        (window,) = windows(rows, len(rows) - 1)
        with torch.no_grad():
            return float(self.loss(*window, None)[0])


class Compare(Observer):
    """Lets torch take every step too, and compares.

    Parameters
    ----------
    averaging : callable, optional
        Optimizer to switch to, on both sides, at the end of the first epoch.
    """

    def __init__(self, reference: Reference, averaging: Callable[[Any], Any] | None = None) -> None:
        self.reference = reference
        self.averaging = averaging
        self.steps = 0
        self.epochs = 0

    def stepped(self, run: Run, result: StepResult) -> None:
        """Compare loss, parameters, and what would be evaluated."""
        theirs = self.reference.step(*run.batches[run.state.window - 1])
        assert result.loss == pytest.approx(theirs, rel=RELATIVE)
        for name, p in self.reference.parameters.items():
            _close(dense(run.state.params[name]), p.detach().numpy(), f"{name} after step {run.state.step}")
        if run.state.averaging:
            ours = run.trainer.evaluated()
            for name, average in self.reference.evaluated().items():
                _close(dense(ours[name]), average, f"the average of {name} after step {run.state.step}")
        self.steps += 1

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Compare the validation loss, begin a new epoch, and switch the optimizer after the first."""
        if not record["averaging"]:
            assert record["valid_loss"] == pytest.approx(self.reference.valid_loss(), rel=RELATIVE)
        self.reference.hidden = None
        self.epochs += 1
        if self.averaging is not None and not run.state.averaging:
            run.trainer.start_averaging()
            self.reference.optimizer = self.averaging(list(self.reference.parameters.values()))


def _close(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    assert abs(ours - theirs).max() <= RELATIVE * abs(theirs).max(), what


def _nt_asgd(parameters: Any) -> Any:
    return torch.optim.ASGD(parameters, lr=2.0, t0=0, lambd=0.0)


def compare(
    optimizer: dict[str, Any], make: Callable[[Any], Any], *, method: str = "dense", averaging: Any = None,
    trainer: type[Trainer] = Trainer,
) -> Compare:  # fmt: skip
    """Train for 20 steps, with an end of an epoch after the thirteenth."""
    config = tiny_config(
        method={"name": method, "sparsity": 0.6},
        model={"embedding_size": 10, "hidden_size": 12},
        optimizer={"clip": 0.25, **optimizer},
        training={"epochs": 2, "max_steps": STEPS},
    )
    run = Run(config, tiny_corpus(vocabulary=50))
    run.trainer.__class__ = trainer
    masks = {name: w.support.mask() for name, w in run.state.params.items() if isinstance(w, SparseWeight)}
    observer = Compare(Reference(run, make, masks), averaging)
    assert run.train(observer) == "finished"
    assert (observer.steps, observer.epochs) == (STEPS, 2)
    return observer


def _step_decay(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=5.0)
    optimizer.schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.5)
    return optimizer


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "sgd": ({"name": "sgd", "lr": 5.0}, lambda p: torch.optim.SGD(p, lr=5.0)),
    "momentum": (
        {"name": "sgd", "lr": 1.0, "momentum": 0.9, "weight_decay": 1e-3},
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=1e-3),
    ),
    "step-decay": (
        {"name": "sgd", "lr": 5.0, "schedule": "step-decay", "decay": 0.5, "decay_steps": 6},
        _step_decay,
    ),
    "adam": ({"name": "adam", "lr": 1e-2}, lambda p: torch.optim.Adam(p, lr=1e-2)),
    "adamw": (
        {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dense_training(case: str) -> None:
    compare(*CASES[case])


@pytest.mark.parametrize("name", ["nt-asgd", "snt-asgd"])
def test_the_averaging_phase(name: str) -> None:
    observer = compare({"name": name, "lr": 2.0}, lambda p: torch.optim.SGD(p, lr=2.0), averaging=_nt_asgd)
    assert any("ax" in s for s in observer.reference.optimizer.state.values())


@pytest.mark.parametrize("case", ["sgd", "momentum", "adam"])
def test_static_sparse_training_is_torch_with_masks(case: str) -> None:
    observer = compare(*CASES[case], method="static")
    kept = {name: float(mask.double().mean()) for name, mask in observer.reference.masks.items()}
    assert len(kept) == 6
    assert all(abs(density - 0.4) < 0.01 for density in kept.values())


class StateCrossesEpochs(Trainer):
    """A planted mistake: the hidden state of the text's end enters its beginning."""

    def end_epoch(self, *, triggered: bool) -> dict[str, Exchange]:
        carried = self.state.carried
        exchanges = super().end_epoch(triggered=triggered)
        self.state.carried = carried
        return exchanges


class StateNotCarried(Trainer):
    """A planted mistake: every window begins from zero."""

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> StepResult:
        result = super().step(tokens, targets)
        self.state.carried = self.model.zero_states(tokens.shape[1], np.float64)
        return result


@pytest.mark.parametrize("mistake", [StateCrossesEpochs, StateNotCarried])
def test_catches(mistake: type[Trainer]) -> None:
    with pytest.raises(AssertionError):
        compare(*CASES["sgd"], trainer=mistake)
