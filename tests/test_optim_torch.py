"""Optimizers, clipping and schedules against torch, in float64 and over random gradients.

The gradients do not depend on the weights, so a rounding difference is carried along but never amplified:
some ten roundings of 1.1e-16 in each of 12 steps, and for Adam an inner division by a root that is at least
sqrt(1 - beta2) of the numerator's scale, stay below 1e-12 of the numbers' size.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from refimpl.methods.schedule import Cosine as DropCosine
from refimpl.optim import (
    ASGD,
    SGD,
    SNTASGD,
    Adam,
    EpochDecay,
    Optimizer,
    Schedule,
    StepDecay,
)
from refimpl.optim.clipping import clip_scale, global_norm, squared_norm

torch = pytest.importorskip("torch")

STEPS = 12
LRS = [0.1, 0.1, 0.3, 0.3, 0.05, 0.05, 0.05, 0.2, 0.2, 0.2, 0.2, 0.01]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Make torch keep ASGD's learning rate and averaging weight, which are tensors, in float64 as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def compare(
    ours: Optimizer, theirs: Any, names: dict[str, str], *, lrs: list[float], lag: bool = False, seed: int = 0
) -> None:
    """Take the same steps with both; compare weights and slots after each."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3, 5))
    parameter = torch.nn.Parameter(torch.tensor(values))
    slots = ours.init(values)
    optimizer = theirs([parameter], lrs[0])
    for step, lr in enumerate(lrs, start=1):
        grad = rng.standard_normal(values.shape) * rng.choice([0, 1e-3, 1, 10], values.shape)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        ours.update(values, grad, slots, lr=lrs[max(0, step - 2)] if lag else lr, step=step)
        close(values, parameter, f"weights after step {step}")
        for mine, other in names.items():
            close(slots[mine], optimizer.state[parameter][other], f"{mine} after step {step}")


def close(ours: np.ndarray, theirs: Any, what: str) -> None:
    expected = theirs.detach().numpy()
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * scale, err_msg=what)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
        for momentum, dampening, nesterov, decay in product([0, 0.9], [0, 0.3], [False, True], [0, 0.02])
        if not nesterov or (momentum and not dampening)
    ],
    ids=str,
)
def test_sgd(options: dict[str, Any]) -> None:
    names = {"momentum_buffer": "momentum_buffer"} if options["momentum"] else {}
    compare(SGD(**options), lambda p, lr: torch.optim.SGD(p, lr=lr, **options), names, lrs=LRS)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("decay", [0, 0.02])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(betas: tuple[float, float], decay: float, eps: float, decoupled: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    compare(
        Adam(betas, eps, decay, decoupled),
        lambda p, lr: kind(p, lr=lr, betas=betas, eps=eps, weight_decay=decay),
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
        lrs=LRS,
    )


ASGD_OPTIONS = list(product([0, 1e-4, 0.1], [0, 0.75], [0, 3, 1e6], [0, 0.02]))


@pytest.mark.parametrize(("lambd", "alpha", "t0", "decay"), ASGD_OPTIONS)
def test_asgd(lambd: float, alpha: float, t0: float, decay: float) -> None:
    """At a constant learning rate as it is; under a schedule once ours is given torch's lag of one step."""

    def theirs(p: list[Any], lr: float) -> Any:
        return torch.optim.ASGD(p, lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=decay)

    ours = ASGD(lambd, alpha, t0, decay)
    compare(ours, theirs, {"average": "ax"}, lrs=[0.2] * STEPS)
    compare(ours, theirs, {"average": "ax"}, lrs=LRS, lag=True)


def test_asgd_without_the_lag_differs() -> None:
    with pytest.raises(AssertionError, match="weights after step 3"):
        compare(
            ASGD(t0=0, lambd=0),
            lambda p, lr: torch.optim.ASGD(p, lr=lr, lambd=0, t0=0),
            {"average": "ax"},
            lrs=LRS,
        )


def test_snt_asgd_on_a_dense_array_is_torchs_asgd() -> None:
    compare(
        SNTASGD(weight_decay=0.02),
        lambda p, lr: torch.optim.ASGD(p, lr=lr, lambd=0, t0=0, weight_decay=0.02),
        {"average": "ax"},
        lrs=[0.2] * STEPS,
    )


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.04, 1.0, 1e6])
def test_clipping(scale: float) -> None:
    rng = np.random.default_rng(1)
    grads = [rng.standard_normal(shape) * scale for shape in [(3, 5), (7,), (1,)]]
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.tensor(grad)
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.25).item()
    norm = global_norm(squared_norm(g) for g in grads)
    assert norm == pytest.approx(expected, rel=1e-14)
    for parameter, grad in zip(parameters, grads, strict=True):
        np.testing.assert_allclose(grad * clip_scale(norm, 0.25), parameter.grad.numpy(), rtol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_recursive_cosine_is_torchs_to_the_bit(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.005)
    ours = DropCosine(0.8, steps, 0.005, form="recursive", past="rise")
    for t in range(3 * steps + 2):
        assert ours(t) == optimizer.param_groups[0]["lr"], t
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_decays_are_torchs(kind: str) -> None:
    """Torch multiplies by the factor once more at each milestone; ours takes a power, rounded once."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedulers = torch.optim.lr_scheduler
    if kind == "step":
        ours: Schedule = StepDecay(0.5, 0.1, (3, 5, 9))
        theirs = schedulers.MultiStepLR(optimizer, [3, 5, 9], 0.1)
    else:
        ours = EpochDecay(0.5, 0.8, 4)
        theirs = schedulers.LambdaLR(optimizer, lambda epoch: 0.8 ** max(0, epoch - 4))
    for t in range(STEPS):
        assert ours(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-15)
        optimizer.step()
        theirs.step()
