"""What the tests of methods that score weights share: small models, their probes, and who must stay."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.methods.grasp import GraSP
from refimpl.methods.magnitude_init import MagnitudeInit
from refimpl.methods.snip import SNIP
from refimpl.methods.synflow import SynFlow
from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.training.probe import LanguageProbe
from refimpl.weights import Params, ParamSpec, support_of, values_of

METHODS: dict[str, Any] = {"magnitude-init": MagnitudeInit, "snip": SNIP, "grasp": GraSP, "synflow": SynFlow}
Arrays = dict[str, np.ndarray]


class MLPProbe:
    """A batch of a network, with the last layer divided by the temperature."""

    def __init__(self, model: MLP, x: np.ndarray, labels: np.ndarray, scale: float = 1.0) -> None:
        self.model, self.x, self.labels, self.scale = model, x, labels, scale

    def loss_and_grads(self, params: Params, *, temperature: float = 1.0) -> tuple[float, Any]:
        last = self.model.layers - 1
        names = (f"layers.{last}.weight", f"layers.{last}.bias")
        seen = dict(params)
        seen |= {name: values_of(params[name]) / temperature for name in names}
        x = self.x.astype(values_of(params[names[0]]).dtype)
        loss, grads, _ = self.model.loss_and_grads(seen, x, self.labels)
        out = {name: self.scale * (g if isinstance(g, np.ndarray) else g.dense()) for name, g in grads.items()}
        return loss * self.scale, out | {name: out[name] / temperature for name in names}

    def flow(self, params: Params) -> tuple[float, Any]:
        return self.model.flow(params)


def mlp_case(seed: int, sizes: tuple[int, ...] = (6, 8, 5, 3), batch: int = 7) -> tuple[MLP, Params, MLPProbe]:
    rng = np.random.default_rng(seed)
    model = MLP(sizes)
    probe = MLPProbe(model, rng.standard_normal((sizes[0], batch)), rng.integers(0, sizes[-1], batch))
    return model, model.init(seed, np.float64), probe


def language_case(seed: int, *, tied: bool, **options: Any) -> tuple[LanguageModel, Params, LanguageProbe]:
    rng = np.random.default_rng(seed)
    model = LanguageModel(12, 6 if tied else 5, 6, 2, tied, **options)
    tokens, targets = rng.integers(0, 12, (2, 8, 4))
    params = model.init(seed, np.float64)
    params["decoder.bias"] = rng.uniform(-0.5, 0.5, 12)
    return model, params, LanguageProbe(model, tokens, targets, seed)


def weights_of(specs: Mapping[str, ParamSpec]) -> list[str]:
    return [name for name, spec in specs.items() if spec.prunable]


def total_of(specs: Mapping[str, ParamSpec]) -> int:
    return sum(spec.size for spec in specs.values() if spec.prunable)


def masks_of(params: Params, specs: Mapping[str, ParamSpec]) -> Arrays:
    return {name: support_of(params[name]).mask() for name in weights_of(specs)}


def kept(params: Params, specs: Mapping[str, ParamSpec]) -> int:
    return sum(int(mask.sum()) for mask in masks_of(params, specs).values())


def flat(arrays: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
    return np.concatenate([np.asarray(arrays[name]).reshape(-1) for name in names])


def check_best_stay(params: Params, specs: Mapping[str, ParamSpec], scores: Arrays, count: int, slack: float) -> None:
    """Check that ``count`` entries stay, none of which another beats by more than the error of the scores."""
    names = weights_of(specs)
    stays, ranked = flat(masks_of(params, specs), names), flat(scores, names)
    assert stays.sum() == count
    if 0 < count < stays.size:
        assert ranked[stays].min() >= ranked[~stays].max() - slack * np.abs(ranked).max()


SECOND_ORDER = 1e-8
"""Ten times the error that GraSP's docstring says was measured, for other machines' sums."""
