"""Floating-point operations of a run: counted as executed, and as the literature counts them.

A linear map on one column costs 2|A| operations forward, 2|A| for the input gradient and 2|B| for the weight gradient,
where A is the set of entries in use and B the set whose gradient is computed (a multiplication and an addition count as
two). Biases, nonlinearities, normalisation, optimizer and the choice of what to drop are not counted, as usual in this
literature.

*Executed* is what this code did; a gradient that a step needs beyond B for more than one reason (growth, the dense norm
that clips, an average that leaks) is counted once, as one evaluation of all entries. *Published* is the formula of Evci
et al. ("Rigging the lottery", ICML 2020, appendix on FLOPs) with backward = 2 × forward for every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from refimpl.weights import ParamSpec

Counts = Mapping[str, int]
"""Entries by parameter name."""


def forward(specs: Mapping[str, ParamSpec], used: Counts) -> float:
    """Return the operations of inference on one sample (a token)."""
    return sum(2.0 * count * specs[name].columns_per_sample for name, count in used.items())


def step(specs: Mapping[str, ParamSpec], used: Counts, graded: Counts, samples: int) -> float:
    """Return the operations that a training step executes.

    Parameters
    ----------
    used, graded : mapping of str to int
        |A| and |B| of each weight.
    samples : int
        Tokens in the batch.
    """
    total = 0.0
    for name, count in used.items():
        spec = specs[name]
        total += 2.0 * spec.columns_per_sample * (count * (1 + spec.input_gradient) + graded[name])
    return total * samples


def dense_gradient(specs: Mapping[str, ParamSpec], names: Iterable[str], graded: Counts, samples: int) -> float:
    """Return the operations that whole gradients of the named weights take beyond those on B."""
    return sum(2.0 * specs[name].columns_per_sample * (specs[name].size - graded[name]) for name in names) * samples


def published_step(
    specs: Mapping[str, ParamSpec], method: str, used: Counts, graded: Counts, interval: int = 100
) -> float:
    r"""Return the training operations for one sample as the literature counts them.

    With :math:`f_D` and :math:`f_S` the forward operations of the dense and of the sparse model: dense :math:`3 f_D`;
    static, SET and Selfish :math:`3 f_S`; RigL :math:`(3 f_S \Delta T + 2 f_S + f_D) / (\Delta T + 1)`; Top-KAST
    :math:`2 f_A + f_B`.
    """
    sparse = forward(specs, used)
    if method == "rigl":
        dense = forward(specs, {name: specs[name].size for name in used})
        return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    return 2 * sparse + forward(specs, graded)
