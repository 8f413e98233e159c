"""AC/DC on an MLP with batch norm, step by step against the published loop, written out once more with masks.

The reading holds dense arrays, masks, momentum and running statistics in plain NumPy, its forward and backward pass
included, and knows nothing of supports, layers, optimizers or exchanges.

*How close.* The two add up the same terms in another order. What rounding can do over a run is measured: the reading is
run again with every gradient disturbed by `DISTURBED` of its largest entry, in random directions. A gradient is a chain
of about ten sums of at most 20 terms, so that two ways of computing it differ by some hundred roundings, 2e-14 of its
largest entry; batch norm, which divides by deviations that can be small, makes it `ROUNDED` at most. So the run may
depart from the reading by ROUNDED / DISTURBED of what the disturbed reading does, and by the roundings of the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from acdc_cases import EPOCHS, STEPS, TURNS

from refimpl import kernels
from refimpl.kernels import threads
from refimpl.methods.acdc import ACDC
from refimpl.methods.allocation import Allocation
from refimpl.methods.dense import Dense
from refimpl.models.classifier import Classifier
from refimpl.models.norm_mlp import NormMLP
from refimpl.optim import SGD
from refimpl.training.trainer import Trainer
from refimpl.weights import SparseWeight, support_of, values_of

SIZES = (8, 10, 6, 4)
NETWORK = NormMLP(SIZES)
SPECS = NETWORK.specs()
PRUNABLE = [name for name, spec in SPECS.items() if spec.prunable]
BATCH = 12
DENSITY = 0.25  # of 80, 60 and 24 weights: whole numbers
DISTURBED, ROUNDED = 1e-10, 1e-13
EPS = float(np.finfo(float).eps)

State = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _spec() -> Iterator[None]:
    """Compile nothing, and use one thread."""
    before = threads.get()
    threads.set_count(1)
    with kernels.use("spec"):
        yield
    threads.set_count(before)


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch, the same in each; their classes can be learned."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((SIZES[0], SIZES[-1]))
    out = []
    for _ in range(STEPS):
        labels = rng.integers(0, SIZES[-1], BATCH)
        out.append((centres[:, labels] + 2 * rng.standard_normal((SIZES[0], BATCH)), labels))
    return out


DATA = batches()


def falling(step: int, epoch: int) -> float:
    """One learning-rate schedule for the whole run."""
    return 0.2 * 0.99**step


# --- the reading


def differentiate(w: State, statistics: State, x: np.ndarray, labels: np.ndarray) -> tuple[State, State]:
    """Return the gradients of the mean cross-entropy, and the running statistics after the batch."""
    n, last = x.shape[1], len(SIZES) - 2
    inputs, normalised, roots, after = [], [], [], dict(statistics)
    for k in range(last):
        inputs.append(x)
        z = w[f"layers.{k}.weight"] @ x
        mean, var = z.mean(1), z.var(1)
        roots.append(np.sqrt(var + 1e-5))
        normalised.append((z - mean[:, None]) / roots[k][:, None])
        for name, new in (("mean", mean), ("var", var * n / (n - 1))):
            key = f"norms.{k}.running_{name}"
            after[key] = 0.9 * statistics[key] + 0.1 * new
        after[f"norms.{k}.num_batches_tracked"] = statistics[f"norms.{k}.num_batches_tracked"] + 1
        x = np.maximum(w[f"norms.{k}.weight"][:, None] * normalised[k] + w[f"norms.{k}.bias"][:, None], 0)
    scores = w[f"layers.{last}.weight"] @ x + w[f"layers.{last}.bias"][:, None]
    p = np.exp(scores - scores.max(0))
    d = (p / p.sum(0) - np.eye(SIZES[-1])[:, labels]) / n
    g = {f"layers.{last}.weight": d @ x.T, f"layers.{last}.bias": d.sum(1)}
    dx = w[f"layers.{last}.weight"].T @ d
    for k in reversed(range(last)):
        d = dx * (x > 0)
        g[f"norms.{k}.weight"], g[f"norms.{k}.bias"] = (d * normalised[k]).sum(1), d.sum(1)
        d = d * w[f"norms.{k}.weight"][:, None]
        d = d - d.mean(1)[:, None] - normalised[k] * (d * normalised[k]).mean(1)[:, None]
        d = d / roots[k][:, None]
        x = inputs[k]
        g[f"layers.{k}.weight"], dx = d @ x.T, w[f"layers.{k}.weight"].T @ d
    return g, after


def select(w: State, scope: str, count: str) -> State:
    """Return masks of the largest magnitudes: as many as the density says, or those above the authors' threshold."""
    parts = [PRUNABLE] if scope == "global" else [[name] for name in PRUNABLE]
    masks = {name: np.ones(spec.shape) for name, spec in SPECS.items()}
    for part in parts:
        magnitude = np.concatenate([np.abs(w[name]).reshape(-1) for name in part])
        k = int(DENSITY * magnitude.size)
        if count == "exact":
            kept = np.zeros(magnitude.size)
            kept[np.argsort(-magnitude, kind="stable")[:k]] = 1
        else:
            score = magnitude + 1e-4
            kept = (score > np.sort(score)[::-1][k - 1]).astype(float)
        start = 0
        for name in part:
            masks[name] = kept[start : start + w[name].size].reshape(w[name].shape)
            start += w[name].size
    return masks


def reading(
    *, optimizer: SGD, scope: str, count: str, reset: bool, stale: bool = True, disturbed: float = 0.0
) -> Iterator[tuple[State, State, State, State]]:
    """Yield weights, masks, momentum and running statistics after each step.

    ``stale``: the momentum of masked weights stays where it is and decays, as in the authors' program.
    """
    w: State = {name: values_of(array).copy() for name, array in NETWORK.init(0, np.float64).items()}
    statistics: State = dict(NETWORK.buffers(np.float64))
    m = {name: np.ones(spec.shape) for name, spec in SPECS.items()}
    v = {name: np.zeros(spec.shape) for name, spec in SPECS.items()}
    mu, decay = optimizer.momentum, optimizer.weight_decay
    noise = np.random.default_rng(1)
    step = 0
    for epoch in range(EPOCHS):
        forget = False
        if epoch in TURNS.compress:
            m = select(w, scope, count)
        if epoch in TURNS.decompress:
            w = {name: np.where(m[name] == 1, w[name], 0) for name in w}
            m = {name: np.ones(spec.shape) for name, spec in SPECS.items()}
            forget = reset
        for x, labels in DATA:
            eta = falling(step, epoch)
            step += 1
            w = {name: w[name] * m[name] for name in w}
            if forget:
                v = {name: np.zeros(spec.shape) for name, spec in SPECS.items()}
                forget = False
            if not stale:
                v = {name: v[name] * m[name] for name in v}
            grads, statistics = differentiate(w, statistics, x, labels)
            for name in w:
                g = grads[name]
                g = (g + disturbed * np.abs(g).max() * noise.uniform(-1, 1, g.shape)) * m[name]
                g = g + decay * w[name]
                v[name] = mu * v[name] + g
                w[name] = (w[name] - eta * (g + mu * v[name] if optimizer.nesterov else v[name])) * m[name]
            yield w, m, dict(v), statistics


# --- the comparison


def begin(method: Any, optimizer: SGD, *, model: Any = None, trainer: type[Trainer] = Trainer) -> Trainer:
    return trainer.begin(
        model or Classifier(NETWORK), method, optimizer, falling, batch=BATCH, dtype=np.float64, seed=0,
        steps_per_epoch=STEPS,
    )  # fmt: skip


def advance(trainer: Trainer) -> None:
    """Take a step, with the end of the epoch before it if it is the first of another."""
    if trainer.state.window == STEPS:
        trainer.end_epoch(triggered=False)
    trainer.step(*DATA[trainer.state.window])


def check_reading(
    *, make: Any = ACDC, scope: str = "global", count: str = "exact", reset: bool = True, nesterov: bool = False,
    stale: bool = True, model: Any = None, trainer: type[Trainer] = Trainer,
) -> float:  # fmt: skip
    """Compare a run with the reading, and return the largest departure in units of what is allowed."""
    optimizer = SGD(0.9, weight_decay=1e-2, nesterov=nesterov)
    method = make(Allocation(DENSITY), TURNS, epoch_steps=STEPS, scope=scope, reset_momentum=reset, count=count)
    run = begin(method, optimizer, model=model, trainer=trainer)
    options: dict[str, Any] = {"optimizer": optimizer, "scope": scope, "count": count, "reset": reset, "stale": stale}
    steps = zip(reading(**options), reading(**options, disturbed=DISTURBED), strict=True)
    most = 0.0
    for number, ((w, m, v, statistics), others) in enumerate(steps, 1):
        advance(run)
        where = f"step {number}"
        assert all(np.array_equal(m[name], others[1][name]) for name in m), "the disturbance changed what is kept"
        for name, spec in SPECS.items():
            weight = run.state.params[name]
            compressed = spec.prunable and TURNS.compressed((number - 1) // STEPS)
            assert isinstance(weight, SparseWeight) == compressed, f"{where}: {name} is stored in another form"
            assert np.array_equal(support_of(weight).mask(), m[name] == 1), f"{where}: {name} has another support"
        for name in SPECS:
            weight, slots = run.state.params[name], run.state.slots[name]
            flat = support_of(weight).flat
            for what, ours, theirs, disturbed in (
                ("value", values_of(weight), w, others[0]),
                ("momentum", slots["momentum_buffer"], v, others[2]),
            ):
                expected, apart = theirs[name].reshape(-1)[flat], disturbed[name].reshape(-1)[flat]
                most = max(most, departure(f"{where}: {what} of {name}", ours.reshape(-1), expected, apart))
        carried: Mapping[str, np.ndarray] = run.state.carried
        assert carried.keys() == statistics.keys()
        for name, array in carried.items():
            most = max(most, departure(f"{where}: {name}", array, statistics[name], others[3][name]))
    return most


def departure(what: str, own: np.ndarray, expected: np.ndarray, disturbed: np.ndarray) -> float:
    """Return how far a tensor is from the reading's, in units of what is allowed."""
    allowed = ROUNDED / DISTURBED * np.abs(disturbed - expected).max() + 16 * EPS * np.abs(expected).max()
    error = np.abs(own - expected).max()
    assert error <= allowed, f"{what} is off by {error}; rounding may make it {allowed}"
    return float(error / allowed) if allowed else 0.0


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("count", ["exact", "strict-threshold"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_run_is_the_published_loop(scope: str, count: str, nesterov: bool) -> None:
    """With the reset, what the authors' program remembers of masked weights plays no part."""
    check_reading(scope=scope, count=count, nesterov=nesterov)
    check_reading(scope=scope, count=count, nesterov=nesterov, stale=False)


def test_compiled_kernels_are_the_published_loop() -> None:
    with kernels.use("cpu"):
        check_reading()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("count", ["exact", "strict-threshold"])
def test_without_the_reset_stale_momentum_is_the_difference(count: str, nesterov: bool) -> None:
    """The same loop if nothing is remembered of what is masked; the authors' program differs, at the first return."""
    check_reading(count=count, nesterov=nesterov, reset=False, stale=False)
    with pytest.raises(AssertionError, match=f"^step {2 * STEPS + 1}: (value|momentum)"):
        check_reading(count=count, nesterov=nesterov, reset=False, stale=True)


def test_the_phases_differ() -> None:
    """So that something is compared: supports change from phase to phase, counts are those of the rule, it learns."""
    optimizer = SGD(0.9, weight_decay=1e-2)
    for count, kept in (("exact", 41), ("strict-threshold", 40)):
        steps = list(reading(optimizer=optimizer, scope="global", count=count, reset=True))
        masks = [steps[epoch * STEPS][1] for epoch in TURNS.compress]
        assert [sum(int(m[name].sum()) for name in PRUNABLE) for m in masks] == [kept] * len(masks)
        assert all(any((a[name] != b[name]).any() for name in PRUNABLE) for a, b in pairwise(masks))
    run = begin(ACDC(Allocation(DENSITY), TURNS, epoch_steps=STEPS), optimizer)
    losses = []
    for _ in range(EPOCHS * STEPS):
        before = run.state.loss_sum
        advance(run)
        losses.append((run.state.loss_sum - (before if run.state.window > 1 else 0.0)) / BATCH)
    assert np.mean(losses[-STEPS:]) < 0.9 * np.mean(losses[:STEPS])


@pytest.mark.parametrize("nesterov", [False, True])
def test_at_sparsity_0_it_is_dense_training(nesterov: bool) -> None:
    """With the reset off, to the bit: values, momentum and running statistics. The reset is the difference."""
    optimizer = SGD(0.9, weight_decay=1e-2, nesterov=nesterov)
    runs = [
        begin(Dense(), optimizer),
        begin(ACDC(Allocation(1.0), TURNS, epoch_steps=STEPS, reset_momentum=False), optimizer),
        begin(ACDC(Allocation(1.0), TURNS, epoch_steps=STEPS), optimizer),
    ]
    for _ in range(EPOCHS * STEPS):
        for run in runs:
            advance(run)
        dense, acdc = snapshot(runs[0]), snapshot(runs[1])
        assert dense.keys() == acdc.keys()
        assert all(dense[name].tobytes() == acdc[name].tobytes() for name in dense)
    assert snapshot(runs[2])["layers.0.weight"].tobytes() != dense["layers.0.weight"].tobytes()


def snapshot(run: Trainer) -> State:
    arrays = {name: values_of(w) for name, w in run.state.params.items()}
    momentum = {f"momentum of {name}": slots["momentum_buffer"] for name, slots in run.state.slots.items()}
    return {**arrays, **momentum, **run.state.carried}


# --- planted mistakes


class NeverForgets(ACDC):
    """As the authors' program under torch 2."""

    def forgets(self, step: int) -> bool:
        return False


class ForgetsAtBoth(ACDC):
    """As another program."""

    def forgets(self, step: int) -> bool:
        return step in self.compress_steps or super().forgets(step)


class OtherCount(ACDC):
    """One fewer than asked for."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **{**options, "count": "strict-threshold"})


class BeginsStatisticsAnew(Classifier):
    """In each epoch, as hidden states are."""

    def next_epoch(self, carried: Any) -> Any:
        return self.begin(BATCH, np.float64)


class LosesStatistics(Classifier):
    """Keeps those from before the first batch."""

    def loss_and_grads(self, params: Any, inputs: Any, targets: Any, carried: Any, draws: Any = None) -> Any:
        return (*super().loss_and_grads(params, inputs, targets, carried, draws)[:2], carried)


class NearlyRight(Classifier):
    """The gradient of one batch norm's scales is off by a billionth."""

    def loss_and_grads(self, params: Any, inputs: Any, targets: Any, carried: Any, draws: Any = None) -> Any:
        loss, grads, after = super().loss_and_grads(params, inputs, targets, carried, draws)
        g = grads["norms.0.weight"]
        assert isinstance(g, np.ndarray)
        return loss, {**grads, "norms.0.weight": g * (1 + 1e-9)}, after


class SparesNorms(Trainer):
    """No weight decay on scales and shifts, as many recipes have it."""

    def _update_one(self, name: str, *given: Any) -> None:
        if SPECS[name].kind != "norm":
            super()._update_one(name, *given)
            return
        kept = self.first_optimizer
        assert isinstance(kept, SGD)
        self.first_optimizer = SGD(kept.momentum, nesterov=kept.nesterov)
        super()._update_one(name, *given)
        self.first_optimizer = kept


class ForgetsWeightsAlone(Trainer):
    """The momentum of scales, shifts and biases survives the reset."""

    def end_epoch(self, *, triggered: bool) -> Any:
        found = super().end_epoch(triggered=triggered)
        if self.state.epoch in TURNS.decompress:
            for name in PRUNABLE:
                self.state.slots[name]["momentum_buffer"][...] = 0
        return found


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        ({"make": NeverForgets}, f"step {2 * STEPS + 1}: (value|momentum)"),
        ({"make": ForgetsAtBoth}, f"step {STEPS + 1}: (value|momentum)"),
        ({"make": OtherCount}, f"step {STEPS + 1}: .* has another support"),
        ({"model": BeginsStatisticsAnew(NETWORK)}, rf"step {STEPS + 1}: norms\.0\.running_mean is off"),
        ({"model": LosesStatistics(NETWORK)}, r"step 1: norms\.0\.running_mean is off"),
        ({"model": NearlyRight(NETWORK)}, r"step \d+: .* is off"),
        ({"trainer": SparesNorms}, r"step 1: value of norms\.0\.weight is off"),
        (
            {"make": NeverForgets, "trainer": ForgetsWeightsAlone},
            rf"step {2 * STEPS + 1}: value of norms\.0\.weight is off",
        ),
    ],
)
def test_catches_planted_mistakes(planted: dict[str, Any], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        check_reading(**planted)
