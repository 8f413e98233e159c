"""Models with hidden units, and the groups of their units written out entry by entry."""

import numpy as np

from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.weights import SparseWeight, Support

LM = LanguageModel(7, 3, 4, layers=2)
NET = MLP((5, 4, 3, 2))


def places(model):
    """Write the groups of a model out: layer, unit -> list of (tensor, row, column), entries in both ways twice."""
    out = {}
    if isinstance(model, MLP):
        for k in range(model.layers - 1):
            for unit in range(model.sizes[k + 1]):
                row = [(f"layers.{k}.weight", unit, j) for j in range(model.sizes[k])]
                column = [(f"layers.{k + 1}.weight", i, unit) for i in range(model.sizes[k + 2])]
                out[f"layers.{k}", unit] = row + column
        return out
    h = model.hidden_size
    for k in range(model.layers):
        for unit in range(h):
            members = []
            for gate in range(4):
                inputs = model.embedding_size if k == 0 else h
                members += [(f"rnn.weight_ih_l{k}", gate * h + unit, j) for j in range(inputs)]
                members += [(f"rnn.weight_hh_l{k}", gate * h + unit, j) for j in range(h)]
            members += [(f"rnn.weight_hh_l{k}", i, unit) for i in range(4 * h)]
            if k + 1 < model.layers:
                members += [(f"rnn.weight_ih_l{k + 1}", i, unit) for i in range(4 * h)]
            else:
                members += [("decoder.weight", i, unit) for i in range(model.vocabulary)]
            out[f"rnn.{k}", unit] = members
    return out


def drawn(model, seed, sparse=False):
    rng = np.random.default_rng(seed)
    params = {}
    for name, spec in model.specs().items():
        params[name] = rng.standard_normal(spec.shape)
        if sparse and spec.prunable:
            params[name] = SparseWeight.from_dense(params[name], Support.from_mask(rng.random(spec.shape) < 0.6))
    return params


def dense(weight):
    return weight.dense() if isinstance(weight, SparseWeight) else weight


def kill(params, model, units):
    """Put the whole groups of some units to zero."""
    for key in units:
        for name, i, j in places(model)[key]:
            weight = params[name]
            if isinstance(weight, SparseWeight):
                at = weight.support.positions_of(np.array([i * weight.shape[1] + j]))[0]
                if at >= 0:
                    weight.values[at] = 0
            else:
                weight[i, j] = 0
