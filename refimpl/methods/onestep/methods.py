"""One exchange of any method, on dense arrays and masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from refimpl.methods.base import Method
from refimpl.methods.exchange import count_stored
from refimpl.methods.onestep.ranking import same_shapes
from refimpl.methods.onestep.result import ArrayGradient, Fate, MaskExchange
from refimpl.weights.carry import CarryRule, Exchange
from refimpl.weights.parameters import Kind, Params, ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support


def method_step(
    method: Method,
    weights: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    *,
    step: int,
    seed: int = 0,
    gradients: Mapping[str, np.ndarray] | None = None,
    slots: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    specs: Mapping[str, ParamSpec] | None = None,
) -> dict[str, MaskExchange]:
    """Let a method exchange the connections of masked dense arrays, as it would in a run.

    Parameters
    ----------
    method : Method
        It is not changed. One that has not begun yet begins with these tensors, and takes the masks for what it
        started with.
    weights, masks : mapping of str to ndarray
        Arrays by name, and what exists of each; a weight without a mask is dense, and not the method's.
    step, seed : int
        Which exchange of which run.
    gradients : mapping of str to ndarray
        Full gradients, for methods that look at them.
    slots : mapping of str to mapping of str to ndarray
        For each weight the optimizer's arrays of its shape.
    specs : mapping of str to ParamSpec
        What the method may know of each tensor; by default those with a mask are prunable, and linear or convolutions
        by their number of axes.

    Returns
    -------
    dict of str to MaskExchange
        For every weight; one that the method leaves alone is all kept.

    Raises
    ------
    ValueError
        If shapes differ, and whatever the method refuses.
    """
    for name, weight in weights.items():
        same_shapes(
            weight.shape,
            {f"mask of {name}": masks.get(name), f"gradient of {name}": (gradients or {}).get(name),
             **{f"{slot} of {name}": array for slot, array in (slots or {}).get(name, {}).items()}},
        )  # fmt: skip
    specs = specs or {name: _spec(name, weight, name in masks) for name, weight in weights.items()}
    params: Params = {
        name: SparseWeight.from_dense(weight, Support.from_mask(masks[name])) if name in masks else weight.copy()
        for name, weight in weights.items()
    }
    method = _begun(method, specs, params, seed)
    grads = None if gradients is None else {name: ArrayGradient(array) for name, array in gradients.items()}
    exchanges = method.exchange(params, step=step, seed=seed, gradients=grads)
    out = {}
    for name, weight in weights.items():
        support = Support.from_mask(masks[name]) if name in masks else Support.full(weight.shape)
        exchange = exchanges.get(name, Exchange.of(support, np.empty(0, np.int64), np.empty(0, np.int64)))
        values = weight.reshape(-1)[support.flat]
        if name in exchanges:
            values = method.values_after(name, params[name], exchange, step=step, seed=seed)
        out[name] = _picture(exchange, values, dict((slots or {}).get(name, {})), method.conventions.regrown)
    return out


def _spec(name: str, weight: np.ndarray, prunable: bool) -> ParamSpec:
    kind: Kind = "linear" if weight.ndim == 2 else "conv" if weight.ndim > 2 else "bias"
    return ParamSpec(name, weight.shape, kind, prunable)


def _begun(method: Method, specs: Mapping[str, ParamSpec], params: Params, seed: int) -> Method:
    """Return a copy of the method that has begun, with the counts of these weights."""
    method = copy.deepcopy(method)
    if hasattr(method, "pools") and not method.pools:
        method.supports(specs, seed=seed)
        if hasattr(method, "initial_nnz"):
            supports = {
                name: w.support if isinstance(w, SparseWeight) else Support.full(w.shape) for name, w in params.items()
            }
            method.initial_nnz = {pool.label: count_stored(pool, supports) for pool in method.pools}
    return method


def _picture(exchange: Exchange, values: np.ndarray, slots: Mapping[str, np.ndarray], regrown: str) -> MaskExchange:
    old, new = exchange.old, exchange.new
    dropped, grown = Support(old.shape, exchange.dropped).mask(), Support(old.shape, exchange.grown).mask()
    fate = np.where(old.mask(), Fate.KEPT, Fate.ABSENT).astype(np.int8)
    fate[dropped] = Fate.DROPPED
    fate[grown] = Fate.GROWN
    fate[grown & dropped] = Fate.REGROWN if regrown == "keep" else Fate.REGROWN_ANEW
    rule = CarryRule(regrown="keep" if regrown == "keep" else "reset")
    carried = {name: exchange.carry(array.reshape(-1)[old.flat], rule) for name, array in slots.items()}
    return MaskExchange(
        mask=new.mask(),
        weights=SparseWeight(new, values).dense(),
        dropped=dropped,
        grown=grown,
        slots={name: SparseWeight(new, array).dense() for name, array in carried.items()},
        fate=fate,
    )
