"""What the tests of methods on the quadratic model share: random weights, and what stays by a sort in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from refimpl.methods.allocation import count_at
from refimpl.testing.quadratic import QuadraticModel, promise
from refimpl.weights import Params, ParamSpec, SparseWeight, as_sparse, values_of

SPECS = QuadraticModel().specs()
PRUNABLE = {name: spec for name, spec in SPECS.items() if spec.prunable}
TOTAL = sum(spec.size for spec in PRUNABLE.values())
quick = settings(max_examples=25, deadline=None)


def drawn(seed: int, tied: bool = False) -> dict[str, Any]:
    """Return random dense parameters of the quadratic model, of few different magnitudes if they are to tie."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(-3, 4, spec.shape).astype(float) if tied else rng.standard_normal(spec.shape)
        for name, spec in SPECS.items()
    }


def applied(params: Params, exchanges: dict[str, Any]) -> Params:
    """Return the parameters after exchanges."""
    moved = {name: SparseWeight(e.new, e.carry(values_of(params[name]).reshape(-1))) for name, e in exchanges.items()}
    return params | moved


Place = tuple[str, int]


def stored(params: Params) -> dict[Place, float]:
    """Return the stored values of the prunable tensors by place, in order."""
    out: dict[Place, float] = {}
    for name in PRUNABLE:
        weight = as_sparse(params[name])
        out |= {(name, int(p)): float(v) for p, v in zip(weight.support.flat, weight.values, strict=True)}
    return out


def best(values: dict[Place, float], count: int) -> set[Place]:
    """Return the places of the largest magnitudes; sorting is stable, so of equal ones the first stay."""
    return set(sorted(values, key=lambda place: -abs(values[place]))[:count])


def of_pool(values: dict[Place, float], pool: str) -> list[dict[Place, float]]:
    """Divide places as a convention does: by tensor, gate or layer."""
    parts: dict[str, dict[Place, float]] = {}
    for (name, p), value in values.items():
        spec = SPECS[name]
        row = p // (spec.size // spec.shape[0])
        label = {"matrix": name, "layer": spec.layer, "gate": name}[pool]
        if pool == "gate" and spec.blocks:
            label += next(gate for gate, rows in spec.blocks.items() if rows.start <= row < rows.stop)
        parts.setdefault(label, {})[name, p] = value
    return list(parts.values())


def promises(arrays: dict[str, np.ndarray]) -> Any:
    """Return gradients as a model does."""
    return {name: array if array.ndim == 1 else promise(array) for name, array in arrays.items()}


def picture(weight: Any) -> np.ndarray:
    """Return a weight with its zeros."""
    return weight.dense() if isinstance(weight, SparseWeight) else weight


def sigma(s: Any) -> Any:
    """Return the logistic function."""
    return 1 / (1 + np.exp(-s))


def caught(check: Callable[..., None], *arguments: Any, match: str) -> None:
    """Require that a check fails on a planted mistake."""
    with pytest.raises(AssertionError, match=match):
        check(*arguments)


def count_of_each(specs: Mapping[str, ParamSpec], density: float) -> int:
    """Return how many entries stay if each tensor keeps its share."""
    return sum(count_at(density, spec.size) for spec in specs.values() if spec.prunable)


def count_of_all(specs: Mapping[str, ParamSpec], density: float) -> int:
    """Return how many entries stay if all tensors share one count."""
    return count_at(density, sum(spec.size for spec in specs.values() if spec.prunable))
