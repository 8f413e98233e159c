"""Removing hidden units that nothing reaches and nothing reads: a smaller model that computes the same.

A unit is removed if all its incoming weights (its rows) and all its outgoing ones (its columns in every reader) are
zero or not stored, as :func:`refimpl.methods.iss.dead_units` finds them; its biases go with it. What is computed is the
same up to the order of summation, because every term that is left out is a product with zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import overload

import numpy as np

from refimpl.methods.iss import dead_units, unit_groups
from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.weights import Params, ParamSpec, SparseWeight, Support, Weight


@overload
def compact(params: Params, model: LanguageModel) -> tuple[Params, LanguageModel]: ...
@overload
def compact(params: Params, model: MLP) -> tuple[Params, MLP]: ...
def compact(params: Params, model: LanguageModel | MLP) -> tuple[Params, LanguageModel | MLP]:
    """Return the parameters and the model without units that are dead.

    Of a multilayer perceptron each hidden layer becomes as small as it can, though no smaller than one unit. The layers
    of a language model have one size: each keeps as many units as the one with the most alive, the lowest of its dead
    ones among them. A tied embedding has the size of the hidden layers, so its columns go with the units of the last
    layer, which they read.

    Parameters
    ----------
    params : Params
        Dense arrays or sparse weights; not changed. They are what the forward pass uses, a method's ``view``.
    model : LanguageModel or MLP
        The model to which they belong.

    Returns
    -------
    params : Params
        New arrays; a sparse weight stays one, unless nothing is missing from it any more.
    model : LanguageModel or MLP
        Of the same kind.

    Raises
    ------
    ValueError
        If the parameters are not those of the model, or the model is of another kind.
    """
    if not isinstance(model, (LanguageModel, MLP)):
        raise ValueError(f"{type(model).__name__} cannot be made smaller; give a LanguageModel or an MLP")
    specs = model.specs()
    shapes = {name: spec.shape for name, spec in specs.items()}
    if {name: weight.shape for name, weight in params.items()} != shapes:
        raise ValueError("the parameters are not those of the model; give both as they were trained together")
    groups = unit_groups(specs)
    alive = {
        layer: np.setdiff1d(np.arange(groups[layer].units), dead) for layer, dead in dead_units(params, specs).items()
    }
    if not alive:
        return {name: _copied(weight) for name, weight in params.items()}, model
    small: LanguageModel | MLP
    if isinstance(model, MLP):
        kept = {layer: _filled(units, groups[layer].units, max(1, units.size)) for layer, units in alive.items()}
        hidden = [kept[f"layers.{k}"].size for k in range(model.layers - 1)]
        small = replace(model, sizes=(model.sizes[0], *hidden, model.sizes[-1]))
    else:
        size = max(1, *(units.size for units in alive.values()))
        kept = {layer: _filled(units, model.hidden_size, size) for layer, units in alive.items()}
        small = replace(model, hidden_size=size, embedding_size=size if model.tied else model.embedding_size)
        if model.tied:
            kept["encoder"] = kept[f"rnn.{model.layers - 1}"]
    out: Params = {}
    for name, spec in specs.items():
        rows = _rows(spec, kept[spec.layer]) if spec.layer in kept and spec.kind != "embedding" else None
        out[name] = _part(params[name], rows, kept.get(spec.source))
    return out, small


def _filled(alive: np.ndarray, units: int, size: int) -> np.ndarray:
    """Return ``size`` units, ascending: those alive, and the lowest of the others."""
    dead = np.setdiff1d(np.arange(units), alive)
    return np.sort(np.concatenate([alive, dead[: size - alive.size]]))


def _rows(spec: ParamSpec, kept: np.ndarray) -> np.ndarray:
    """Return the rows of the kept units in each gate."""
    starts = sorted(block.start for block in spec.blocks.values()) or [0]
    return np.concatenate([kept + start for start in starts])


def _part(weight: Weight, rows: np.ndarray | None, columns: np.ndarray | None) -> Weight:
    """Return the given rows and columns of a vector or a matrix, all of them for None."""
    if isinstance(weight, SparseWeight):
        height, width = weight.shape
        rows = np.arange(height) if rows is None else rows
        columns = np.arange(width) if columns is None else columns
        to_row, to_column = np.full(height, -1), np.full(width, -1)
        to_row[rows], to_column[columns] = np.arange(rows.size), np.arange(columns.size)
        row, column = to_row[weight.support.rows], to_column[weight.support.indices]
        stays = (row >= 0) & (column >= 0)
        support = Support((rows.size, columns.size), row[stays] * columns.size + column[stays])
        values = weight.values[stays]
        return values.reshape(support.shape) if support.nnz == support.size else SparseWeight(support, values)
    taken = weight if rows is None else weight[rows]
    return _copied(taken if columns is None else taken[:, columns])


def _copied(weight: Weight) -> Weight:
    if isinstance(weight, SparseWeight):
        return SparseWeight(weight.support, weight.values.copy())
    return np.array(weight, order="C")
