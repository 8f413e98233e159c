r"""NNSTD, the neural network sparse topology distance: how differently two networks of one shape are wired.

Output neuron j of a layer is the set :math:`A_j` of the inputs from which it has a connection. With another
network's :math:`B_k`,

.. math::
    \mathrm{NED}(A, B) &= \frac{|A \setminus B| + |B \setminus A|}{|A \cup B|}
    = 1 - \frac{|A \cap B|}{|A \cup B|},
    \quad \mathrm{NED}(\emptyset, \emptyset) = 0 \\
    d_l &= \frac1{n_l} \min_\pi \sum_j \mathrm{NED}(A_j, B_{\pi(j)}) \in [0, 1] \\
    \mathrm{NNSTD} &= \frac1L \sum_l d_l

over all one-to-one matchings π of the neurons, for the order of hidden neurons means nothing. What π does to
one layer's outputs it does to the next layer's inputs, so they are renamed before the next layer is compared.
The network's inputs keep their names; the neurons of every layer are matched, those of the last one too.

Two rows in which each entry is there with probability ρ are, unless both are empty, at the expected distance
:math:`1 - \rho/(2 - \rho)`, whatever their length: each entry of their union lies in both with probability
:math:`\rho^2 / (2\rho - \rho^2)`. Matching lowers the distance, the more neurons there are to choose from.

Source: Liu et al., "Topological insights into sparse neural networks", ECML-PKDD 2020 (arXiv:2006.14085),
with the matching by the Hungarian method and the renaming as in its authors' program.

Deviations
----------
The definition for recurrent layers, :func:`lstm_distance`, is our own and taken from no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from refimpl.weights.support import Support


def neuron_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return NED of two sets of inputs: 0 for equal ones (two empty ones included), 1 for disjoint ones.

    Parameters
    ----------
    a, b : ndarray of int
        The inputs of each neuron, without repetitions.
    """
    common = np.intersect1d(a, b, assume_unique=True).size
    union = len(a) + len(b) - common
    return 1.0 - common / union if union else 0.0


def chance_distance(density: float) -> float:
    """Return 1 − ρ/(2 − ρ), the distance of two independent random rows of one density, before any matching.

    Raises
    ------
    ValueError
        If the density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"the density is {density}; give a number above 0 and at most 1")
    return 1.0 - density / (2.0 - density)


def neuron_distances(a: Support, b: Support, columns: np.ndarray | None = None) -> np.ndarray:
    """Return NED of each neuron of one layer with each of another.

    Parameters
    ----------
    a, b : Support
        Two layers of one shape (outputs, inputs).
    columns : ndarray of int, optional
        The input of ``b`` that stands for each input of ``a``; by default the same.

    Returns
    -------
    ndarray, shape (outputs, outputs)
        Row j, column k: the distance of neuron j of ``a`` from neuron k of ``b``. The intersections are one
        sparse product.

    Raises
    ------
    ValueError
        If the shapes differ or are not those of matrices, or ``columns`` is no permutation of the inputs.
    """
    if a.shape != b.shape or len(a.shape) != 2:
        raise ValueError(
            f"the layers have shapes {a.shape} and {b.shape}; give two supports of one shape (outputs, inputs)"
        )
    pictures = [
        csr_array((np.ones(s.nnz, np.float64), s.indices.astype(np.int32), s.indptr), shape=s.shape) for s in (a, b)
    ]
    if columns is not None:
        if not np.array_equal(np.sort(columns), np.arange(a.shape[1])):
            raise ValueError(f"columns must be a permutation of the {a.shape[1]} inputs")
        pictures[1] = pictures[1][:, columns]
    common = (pictures[0] @ pictures[1].T).toarray()
    union = np.diff(a.indptr)[:, None] + np.diff(b.indptr)[None, :] - common
    return np.where(union > 0, 1.0 - common / np.maximum(union, 1), 0.0)


def layer_distance(a: Support, b: Support, columns: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """Return the distance of two layers under the best matching of their neurons, and that matching.

    Parameters
    ----------
    a, b, columns
        As in :func:`neuron_distances`.

    Returns
    -------
    distance : float
        In [0, 1].
    matching : ndarray of int, shape (outputs,)
        The neuron of ``b`` that stands for each neuron of ``a``. O(outputs³) in the worst case.

    Raises
    ------
    ValueError
        As :func:`neuron_distances`.
    """
    return _match(neuron_distances(a, b, columns))


def _match(cost: np.ndarray) -> tuple[float, np.ndarray]:
    rows, matching = linear_sum_assignment(cost)
    return float(cost[rows, matching].mean()), matching


def nnstd(layers_a: Sequence[Support], layers_b: Sequence[Support]) -> float:
    """Return NNSTD of two feed-forward networks.

    Parameters
    ----------
    layers_a, layers_b : sequence of Support
        The layers from input to output, each of shape (outputs, inputs).

    Returns
    -------
    float
        The mean over the layers, in [0, 1]. It is 0 if one network is the other with its hidden neurons in
        another order, provided that no two neurons of a layer have the same inputs: between such two the
        matching cannot tell, and may rename the next layer's inputs the other way.

    Raises
    ------
    ValueError
        If the networks have different shapes, no layer, or layers that do not follow one another.
    """
    return float(np.mean(layer_distances(layers_a, layers_b)))


def layer_distances(layers_a: Sequence[Support], layers_b: Sequence[Support]) -> list[float]:
    """Return the distance of each layer; see :func:`nnstd`."""
    if not layers_a or len(layers_a) != len(layers_b):
        raise ValueError(
            f"the networks have {len(layers_a)} and {len(layers_b)} layers; give the same number, at least one"
        )
    out: list[float] = []
    columns: np.ndarray | None = None
    for a, b in zip(layers_a, layers_b):
        if columns is not None and a.shape[-1] != columns.size:
            raise ValueError(
                f"a layer of {a.shape[-1]} inputs follows one of {columns.size} outputs; give the layers in order"
            )
        distance, columns = layer_distance(a, b, columns)
        out.append(distance)
    return out


@dataclass(frozen=True)
class LSTMDistance:
    """How differently two LSTM layers are wired.

    Attributes
    ----------
    input, recurrent : ndarray, shape (gates,)
        Mean NED of the rows of each gate, in the order of the stacked rows.
    matching : ndarray of int, shape (hidden,)
        The hidden unit of the second layer that stands for each of the first: the ``columns`` of what comes
        next.
    """

    input: np.ndarray
    recurrent: np.ndarray
    matching: np.ndarray

    @property
    def distance(self) -> float:
        """Mean over both matrices and all gates."""
        return float(np.concatenate([self.input, self.recurrent]).mean())


def lstm_distance(
    input_a: Support,
    recurrent_a: Support,
    input_b: Support,
    recurrent_b: Support,
    *,
    gates: int = 4,
    columns: np.ndarray | None = None,
) -> LSTMDistance:
    r"""Compare two LSTM layers, hidden unit by hidden unit.

    A hidden unit is one row in each gate of both matrices, and one column of the recurrent matrix. A renaming
    of the units must move all of these together; with the recurrent columns among them, the best renaming is
    a quadratic assignment problem, which cannot be solved at this size. So the units are matched by what they
    receive from below, and the recurrent connections are compared under that matching:

    .. math::
        \pi &= \arg\min_\pi \sum_j \frac1G \sum_g \mathrm{NED}(A_{g,j}, B_{g,\pi(j)})
        \quad\text{over the input matrix} \\
        d^{\mathrm{in}}_g &= \frac1H \sum_j \mathrm{NED}(A_{g,j}, B_{g,\pi(j)}) \\
        d^{\mathrm{rec}}_g &= \frac1H \sum_j
        \mathrm{NED}\bigl(A^{\mathrm{rec}}_{g,j}, \pi^{-1}(B^{\mathrm{rec}}_{g,\pi(j)})\bigr)

    The distance of the recurrent part is thus an upper bound on what its own best renaming would give, and
    its level for independent wirings is :func:`chance_distance` of the density, as nothing is chosen to suit
    it. That of the input part is lowered by the choice of π, but less than a layer without gates, for G rows
    must agree with one another.

    Parameters
    ----------
    input_a, recurrent_a, input_b, recurrent_b : Support, shapes (G·H, inputs) and (G·H, H)
        The stacked gates of the two layers.
    gates : int
        G: 4 for an LSTM.
    columns : ndarray of int, optional
        The input of the second layer that stands for each input of the first, such as the matching of the
        layer below.

    Returns
    -------
    LSTMDistance
        Identical layers, and those that differ by the names of hidden units only, are at distance 0 if the
        input rows tell the units apart.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    hidden = recurrent_a.shape[-1]
    shapes = {s.shape for s in (recurrent_a, recurrent_b)}
    if shapes != {(gates * hidden, hidden)} or input_a.shape[0] != gates * hidden:
        raise ValueError(
            f"the recurrent supports have shapes {recurrent_a.shape} and {recurrent_b.shape}, the "
            f"input one {input_a.shape}; give "
            f"({gates} H, H) and ({gates} H, inputs)"
        )
    costs = _gate_costs(input_a, input_b, gates, columns)
    _, matching = _match(costs.mean(axis=0))
    units = np.arange(hidden)
    recurrent = _gate_costs(recurrent_a, recurrent_b, gates, matching)
    return LSTMDistance(
        input=costs[:, units, matching].mean(axis=1),
        recurrent=recurrent[:, units, matching].mean(axis=1),
        matching=matching,
    )


def _gate_costs(a: Support, b: Support, gates: int, columns: np.ndarray | None) -> np.ndarray:
    """Return the distances of each gate's rows, shape (gates, hidden, hidden)."""
    if a.shape != b.shape:
        raise ValueError(f"the layers have shapes {a.shape} and {b.shape}; give layers of one shape")
    pieces = [[_rows(s, g, gates) for g in range(gates)] for s in (a, b)]
    return np.stack([neuron_distances(one, two, columns) for one, two in zip(*pieces)])


def _rows(support: Support, gate: int, gates: int) -> Support:
    """Return the support of one gate's rows."""
    rows, columns = support.shape[0] // gates, support.shape[1]
    low, high = support.indptr[gate * rows], support.indptr[(gate + 1) * rows]
    return Support((rows, columns), support.flat[low:high] - gate * rows * columns)
