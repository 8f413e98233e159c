r"""ISS, intrinsic sparse structures: a group lasso over hidden units, which removes whole units.

Everything that a hidden unit k of a layer is made of and everything that reads it form one group :math:`\mathcal G_k`:

* its row in each gate of the input weight and of the recurrent weight (for a layer without gates, its row);
* its column of the recurrent weight;
* its column in every map that reads the layer: the next layer's input weight, the decoder.

The loss has the groups' norms added, with a small constant against the kink at zero; after the optimizer's step, what
is nearly zero becomes zero:

.. math::
    L + \lambda \sum_k \lVert \mathcal G_k \rVert, \qquad
    \lVert \mathcal G_k \rVert = \Bigl(\sum_{w \in \mathcal G_k} w^2 + 10^{-8}\Bigr)^{1/2}, \qquad
    \frac{\partial}{\partial w} = \lambda \sum_{k:\, w \in \mathcal G_k} \frac{w}{\lVert \mathcal G_k \rVert}, \qquad
    |w| < \theta \Rightarrow w \leftarrow 0

An entry of a recurrent weight lies in two groups, by its row and by its column. When all of a group is 0 the unit
neither hears nor is heard. At the end of an epoch such units leave S for good, S = A = B, and
:func:`refimpl.models.compact.compact` makes a smaller model of what stays. Biases are in no group: what an unread unit
computes is of no consequence. The sparsity is not asked for but follows from λ.

Source: Wen, He, Rajbhandari, Zhang, Wang, Liu, Hu, Chen, Li, "Learning intrinsic sparse structures within long
short-term memory", ICLR 2018, section 3; smoothing and threshold as in its authors' program.

Deviations
----------
- The entries where row k and column k of the recurrent weight meet belong to the group once, for it is a set. The
  authors' program adds the sums of rows and of columns and so counts them twice: ``corner="twice"``.
- All groups weigh the same, as in that program; there is no factor :math:`\sqrt{|\mathcal G|}`.
- The threshold acts on the weights that lie in groups; the program's acts on all trained arrays, biases and embedding
  included, and rises with its learning rate's L1 coefficient if that is used.
- The program lets zeroed weights move again until the end of training, and removes units afterwards. Here they can move
  until their whole unit is zero at the end of an epoch; from then on the unit costs nothing.
- λ belongs to the mean loss of a token. The program's 0.00245, for two layers of 1500 units, belongs to its own loss;
  if that is the sum over windows of 35 steps, as we take it to be, it is 7e-5 here, the default. It must be tuned.
- A multilayer perceptron's hidden units are grouped likewise; the paper has recurrent networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, support_of, values_of
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads

SMOOTHING = 1e-8


@dataclass(frozen=True)
class UnitGroups:
    """Where the hidden units of one layer have their weights.

    Attributes
    ----------
    layer : str
    units : int
    rows : tuple of str
        Weights of which row r belongs to unit r mod ``units``: the gates are stacked.
    columns : mapping of str to int
        Weights that read the layer, and how many consecutive columns each unit has there: 1, or the positions of a
        convolution's kernel.
    """

    layer: str
    units: int
    rows: tuple[str, ...]
    columns: Mapping[str, int]


def unit_groups(specs: Mapping[str, ParamSpec]) -> dict[str, UnitGroups]:
    """Find the hidden layers and the weights of their units.

    A hidden layer is one whose outputs another layer's weight reads, as :attr:`ParamSpec.source` says. An embedding is
    none: its rows are words.

    Raises
    ------
    ValueError
        If a recurrent layer is read by no other layer that the specs know, or shapes do not fit.
    """
    weights = [spec for spec in specs.values() if spec.kind not in ("bias", "norm")]
    found = {}
    for layer in dict.fromkeys(spec.layer for spec in weights if spec.layer):
        rows = [spec for spec in weights if spec.layer == layer]
        readers = [spec for spec in weights if spec.source == layer]
        if any(spec.kind == "embedding" for spec in rows) or not readers:
            continue
        if all(spec.layer == layer for spec in readers):
            raise ValueError(
                f"nothing is said to read the hidden units of {layer} but the layer itself, so that its groups are "
                "not known; give its readers this layer as their source"
            )
        units = {_units(spec) for spec in rows}
        if len(units) != 1 or 0 in units or any(_columns(spec) % max(units) for spec in readers):
            raise ValueError(
                f"the weights of {layer} and of its readers do not agree on the number of its units; rows must be "
                "gates of that many units, and columns a multiple of it"
            )
        n = units.pop()
        columns = {spec.name: _columns(spec) // n for spec in readers}
        found[layer] = UnitGroups(layer, n, tuple(spec.name for spec in rows), columns)
    return found


def _columns(spec: ParamSpec) -> int:
    return spec.size // spec.shape[0]


def _units(spec: ParamSpec) -> int:
    """Return how many units a weight's rows belong to, 0 if they are no stack of equal blocks."""
    units = spec.shape[0] // max(1, len(spec.blocks))
    stack = [(k * units, (k + 1) * units) for k in range(len(spec.blocks))]
    stacked = sorted((block.start, block.stop) for block in spec.blocks.values()) == stack
    return units if stacked and units * max(1, len(spec.blocks)) == spec.shape[0] else 0


@dataclass(frozen=True)
class _Entries:
    """The entries of one weight, and the units to which each belongs: as arrays that index and broadcast with it."""

    values: np.ndarray  # (rows, columns), or (nnz,)
    row: np.ndarray  # (rows, 1), or (nnz,)
    column: np.ndarray  # (1, columns), or (nnz,)

    @classmethod
    def of(cls, weight: Weight) -> _Entries:
        if isinstance(weight, SparseWeight):
            return cls(weight.values, weight.support.rows, weight.support.indices.astype(np.int64))
        matrix = weight.reshape(weight.shape[0], -1)
        return cls(matrix, np.arange(matrix.shape[0])[:, None], np.arange(matrix.shape[1])[None])

    def sums(self, terms: np.ndarray, unit: np.ndarray, units: int) -> np.ndarray:
        """Return the sum of the terms of each unit."""
        if terms.ndim == 2:
            by_row = unit.shape == (terms.shape[0], 1)
            terms, unit = terms.sum(axis=1 if by_row else 0), unit.reshape(-1)
        return np.bincount(unit, terms, units)


def norms(params: Params, groups: UnitGroups, corner: Literal["once", "twice"] = "once") -> np.ndarray:
    """Return the sum of squares of each unit's group, shape (units,), without smoothing.

    Parameters
    ----------
    params : Params
        Dense or sparse.
    groups : UnitGroups
    corner : {"once", "twice"}
        How often entries in both a unit's row and its column count.
    """
    total = np.zeros(groups.units)
    for name in dict.fromkeys([*groups.rows, *groups.columns]):
        entries = _Entries.of(params[name])
        squares = entries.values.astype(np.float64) ** 2
        if name in groups.rows:
            row = entries.row % groups.units
            total += entries.sums(squares, row, groups.units)
        if name in groups.columns:
            column = entries.column // groups.columns[name]
            total += entries.sums(squares, column, groups.units)
        if name in groups.rows and name in groups.columns and corner == "once":
            total -= entries.sums(squares * (row == column), row, groups.units)
    return total


def dead_units(params: Params, specs: Mapping[str, ParamSpec]) -> dict[str, np.ndarray]:
    """Return the units of each hidden layer whose whole group is zero or absent, ascending."""
    return {layer: _dead(params, groups) for layer, groups in unit_groups(specs).items()}


def _dead(params: Params, groups: UnitGroups) -> np.ndarray:
    alive = np.zeros(groups.units, bool)
    for name in dict.fromkeys([*groups.rows, *groups.columns]):
        entries = _Entries.of(params[name])
        there = (entries.values != 0).astype(np.float64)  # squares could underflow
        if name in groups.rows:
            alive |= entries.sums(there, entries.row % groups.units, groups.units) > 0
        if name in groups.columns:
            alive |= entries.sums(there, entries.column // groups.columns[name], groups.units) > 0
    return np.flatnonzero(~alive)


class ISS(BaseMethod):
    """Intrinsic sparse structures; see the module.

    Parameters
    ----------
    penalty : float
        λ.
    threshold : float
        θ: weights below it in magnitude become 0 after each step.
    corner : {"once", "twice"}
        How often the entries where a unit's row and its column meet count in its norm.
    conventions : Conventions
        None of them is read.

    Raises
    ------
    ValueError
        If an option is outside its range.
    """

    name = "iss"

    def __init__(
        self,
        *,
        penalty: float = 7e-5,
        threshold: float = 1e-4,
        corner: Literal["once", "twice"] = "once",
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(conventions)
        for option, value in (("penalty", penalty), ("threshold", threshold)):
            if not 0 <= value < np.inf:
                raise ValueError(f"the {option} of ISS is {value}; give a finite number of at least 0")
        if corner not in ("once", "twice"):
            raise ValueError(f"corner is {corner!r}; give 'once' or 'twice'")
        self.penalty = penalty
        self.threshold = threshold
        self.corner = corner
        self.groups: dict[str, UnitGroups] = {}

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Find the groups; return no support, for training starts dense.

        Raises
        ------
        ValueError
            If there are none, or a layer's readers are not known.
        """
        self.groups = unit_groups(specs)
        if not self.groups:
            raise ValueError(
                "ISS removes hidden units, but no layer of this model reads another's; use a model with a hidden layer"
            )
        return {}

    def _grouped(self) -> list[str]:
        """Return the names of the weights that lie in groups."""
        return list(dict.fromkeys(name for g in self.groups.values() for name in [*g.rows, *g.columns]))

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Evaluate the gradients on what is stored, and add the penalty's."""
        pulled = super().pull(params, grads)
        if self.penalty:
            for name, gradient in self.penalty_gradient(params).items():
                pulled[name] = pulled[name] + gradient
        return pulled

    def penalty_gradient(self, params: Params) -> dict[str, np.ndarray]:
        """Return the gradient of the penalty, aligned with what is stored."""
        factors: dict[str, np.ndarray] = {}  # by which each entry is to be multiplied, for each weight
        for groups in self.groups.values():
            scale = self.penalty / np.sqrt(norms(params, groups, self.corner) + SMOOTHING)
            for name in dict.fromkeys([*groups.rows, *groups.columns]):
                entries = _Entries.of(params[name])
                factor = np.zeros(())
                if name in groups.rows:
                    row = entries.row % groups.units
                    factor = factor + scale[row]
                if name in groups.columns:
                    column = entries.column // groups.columns[name]
                    factor = factor + scale[column]
                if name in groups.rows and name in groups.columns and self.corner == "once":
                    factor = factor - np.where(row == column, scale[row], 0)
                factors[name] = factors.get(name, np.zeros(())) + factor
        out = {}
        for name, factor in factors.items():
            values = values_of(params[name])
            out[name] = (_Entries.of(params[name]).values * factor).astype(values.dtype).reshape(values.shape)
        return out

    def loss(self, params: Params) -> float:
        """Return the penalty that is added to the loss."""
        return self.penalty * sum(
            float(np.sqrt(norms(params, groups, self.corner) + SMOOTHING).sum()) for groups in self.groups.values()
        )

    def adjust(self, params: Params, *, step: int, lr: float, seed: int) -> None:
        """Put to zero what is nearly zero."""
        for name in self._grouped():
            values = values_of(params[name])
            values[np.abs(values) < self.threshold] = 0

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Return True at the end of each epoch."""
        return epoch_end

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Take the units out of S whose whole group is zero.

        Raises
        ------
        ValueError
            If all units of a layer are.
        """
        goes: dict[str, np.ndarray] = {}
        for groups in self.groups.values():
            dead = np.zeros(groups.units, bool)
            dead[_dead(params, groups)] = True
            if dead.all():
                raise ValueError(
                    f"all {groups.units} units of {groups.layer} are zero, which cuts the network; give ISS a smaller "
                    "penalty or threshold"
                )
            for name in dict.fromkeys([*groups.rows, *groups.columns]):
                entries = _Entries.of(params[name])
                flags = goes.setdefault(name, np.zeros(entries.values.shape, bool))
                if name in groups.rows:
                    flags |= dead[entries.row % groups.units]
                if name in groups.columns:
                    flags |= dead[entries.column // groups.columns[name]]
        nothing = np.empty(0, np.int64)
        return {
            name: Exchange.moving(support_of(params[name]), flags.reshape(-1), nothing)
            for name, flags in goes.items()
            if flags.any()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the groups."""
        return {"groups": [[g.layer, g.units, list(g.rows), dict(g.columns)] for g in self.groups.values()]}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the groups."""
        self.groups = {
            layer: UnitGroups(layer, int(units), tuple(rows), {name: int(n) for name, n in columns.items()})
            for layer, units, rows, columns in state["groups"]
        }
