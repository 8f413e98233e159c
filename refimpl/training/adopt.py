"""Beginning a run with weights that exist already, instead of random ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.training.loop import Run
from refimpl.weights import Params, SparseWeight, Support, Weight, values_of


def begin_with(run: Run, params: Params) -> None:
    """Put weights into a run that has not taken a step; the optimizer starts afresh.

    What the run's method stores sparsely stays on the support that it comes with (all of it, if it comes dense); what
    the method stores densely is filled up with zeros. The validation loss of `params` becomes the one to beat.

    Parameters
    ----------
    run : Run
        At step 0; changed.
    params : dict of str to Weight
        Under the model's names, its buffers among them; not changed. Of a tied model the decoder's weight may be listed
        besides.

    Raises
    ------
    ValueError
        If a name, shape or type is not the model's, or the method cannot begin with given weights.
    """
    given = dict(params)
    if run.config.model.tied and "decoder.weight" in given:
        _check_tie(given.pop("decoder.weight"), given.get("encoder.weight"))
    specs, carried = run.trainer.specs, run.state.carried
    fresh_buffers = carried if isinstance(carried, dict) else {}
    for name in given:
        if name not in specs and name not in fresh_buffers:
            raise ValueError(f"the weights hold {name!r}, which the model does not have; {_ADVICE}")
    for name, spec in specs.items():
        _check(given.get(name), name, spec.shape, np.dtype(run.config.dtype))
    for name, buffer in fresh_buffers.items():
        _check(given.get(name), name, buffer.shape, buffer.dtype)
    run.state.best = run.task.evaluate(given, "valid")["loss"]
    fresh = run.state.params  # a method may train more than the model's parameters
    fitted = {name: _fit(given[name], weight) if name in given else weight for name, weight in fresh.items()}
    run.state.params = run.trainer.method.adopt(fitted)
    if fresh_buffers:
        run.state.carried = {name: np.array(values_of(given[name])) for name in fresh_buffers}
    run.trainer.fresh_slots()


_ADVICE = "give the recipe that they belong to, with settings for sizes that differ"


def _check(weight: Weight | None, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if weight is None:
        raise ValueError(f"the weights lack {name!r}; {_ADVICE}")
    if weight.shape != shape:
        raise ValueError(f"{name!r} has shape {weight.shape} and the model's has {shape}; {_ADVICE}")
    if weight.dtype == dtype:
        return
    if dtype.kind != "f" or weight.dtype.kind != "f":
        raise ValueError(f"{name!r} is {weight.dtype} and the model's is {dtype}; give a file in which it is that")
    raise ValueError(f"{name!r} is {weight.dtype} and the run is {dtype}; set dtype={weight.dtype}")


def _check_tie(decoder: Weight, encoder: Weight | None) -> None:
    if encoder is None or not np.array_equal(_dense(decoder), _dense(encoder)):
        raise ValueError("decoder.weight differs from encoder.weight in a tied model; set model.tied to false")


def _fit(weight: Weight, fresh: Weight) -> Weight:
    """Return a copy that is stored as the fresh weight is: sparsely or densely."""
    if not isinstance(fresh, SparseWeight):
        return _dense(weight).copy()
    if isinstance(weight, SparseWeight):
        return SparseWeight(weight.support, weight.values.copy())
    return SparseWeight(Support.full(weight.shape), values_of(weight).reshape(-1).copy())


def _dense(weight: Weight) -> np.ndarray:
    return weight.dense() if isinstance(weight, SparseWeight) else weight
