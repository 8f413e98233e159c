r"""Floating-point operations that a run executes, by named terms.

A linear map on one column costs 2|A| operations forward, 2|A| for the input gradient and 2|B| for the weight gradient,
where A is the set of entries in use and B the set whose gradient is computed (a multiplication and an addition count as
two). With :math:`c_l` columns for each sample, of a convolution the positions of its output, n samples in a batch, and
L the tensors whose input has a gradient,

.. math::
    \text{forward} = n \sum_l 2 c_l |A_l|, \qquad
    \text{input gradient} = n \sum_{l \in L} 2 c_l |A_l|, \qquad
    \text{weight gradient} = n \sum_l 2 c_l |B_l|

and, where a step needs the gradient outside B, :math:`n \sum_l 2 c_l (N_l - |B_l|)` more, N the size of the tensor,
under the name of the reason. A gradient that is needed for several reasons counts once, for the first of them. Biases,
nonlinearities, normalisation, optimizer and the choice of what to drop are not counted, as usual in this literature.

What papers publish is counted otherwise: :mod:`refimpl.training.published`, and, of convolutional networks,
:mod:`refimpl.training.countings`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from refimpl.methods.base import BaseMethod, Probe
from refimpl.weights import Params, ParamSpec, values_of

if TYPE_CHECKING:
    from refimpl.weights import Grads

Specs = Mapping[str, ParamSpec]
Counts = Mapping[str, int]
"""Entries by parameter name."""
Terms = dict[str, float]
"""Operations by the name of what they were for."""

TERMS = {
    "forward": "forward pass",
    "input_gradient": "gradients of the layers' inputs",
    "weight_gradient": "gradients of the weights, on B",
    "growth": "gradients outside B that decide what grows",
    "observed": "gradients outside B that the method remembers",
    "dense_norm": "gradients outside B for a norm over everything, to clip by",
    "leaking_average": "gradients outside B for an average that leaks",
    "scoring": "passes before training that choose the support",
}
"""What each term of an account stands for, in the order in which they are shown."""


def multiplied(specs: Specs) -> list[str]:
    """Return the names of the parameters that are linear maps."""
    return [name for name, spec in specs.items() if spec.kind not in ("bias", "norm")]


def forward(specs: Specs, used: Counts) -> float:
    """Return the operations of inference on one sample (a token, an image)."""
    return sum(2.0 * count * specs[name].columns_per_sample for name, count in used.items())


def step_terms(
    specs: Specs, used: Counts, graded: Counts, samples: int, whole: Mapping[str, Iterable[str]] | None = None
) -> Terms:
    """Return the operations that a training step executes.

    Parameters
    ----------
    specs : mapping of str to ParamSpec
    used, graded : mapping of str to int
        |A| and |B| of each weight.
    samples : int
        Tokens or images in the batch.
    whole : mapping of str to iterable of str, optional
        As :func:`whole_gradients` returns it: by reason, the weights whose gradient is needed outside B too.
    """
    backward = sum(2.0 * specs[name].columns_per_sample * n for name, n in used.items() if specs[name].input_gradient)
    terms = {"forward": forward(specs, used), "input_gradient": backward, "weight_gradient": forward(specs, graded)}
    counted: set[str] = set()
    for reason, names in (whole or {}).items():
        outside = {name: specs[name].size - graded[name] for name in names if name not in counted}
        terms[reason] = forward(specs, outside)
        counted |= outside.keys()
    return {name: term * samples for name, term in terms.items()}


def step(specs: Specs, used: Counts, graded: Counts, samples: int) -> float:
    """Return the operations of a training step that needs no gradient outside B."""
    return total(step_terms(specs, used, graded, samples))


def whole_gradients(
    method: BaseMethod, number: int, weights: Collection[str], sparse: Collection[str], *, clips: bool, leaks: bool
) -> dict[str, list[str]]:
    """Return the weights whose gradient a step needs outside B, by reason.

    Parameters
    ----------
    method : BaseMethod
    number : int
        The training step that is about to be taken; the first is 1.
    weights, sparse : collection of str
        The linear maps, and those of them that are stored sparsely.
    clips, leaks : bool
        Whether the gradient is clipped, and whether the optimizer is one whose averages leak.
    """
    whole: dict[str, list[str]] = {}
    if method.needs_gradient(number):
        due = method.exchange_due(step=number, epoch_end=False)
        whole["growth" if due else "observed"] = list(sparse)
    if not method.replaces_step(number):
        if clips and method.conventions.clip_norm == "dense":
            whole["dense_norm"] = list(weights)
        if leaks:
            whole["leaking_average"] = list(sparse)
    return whole


def add(account: Terms, terms: Mapping[str, float], times: int = 1) -> None:
    """Add terms to an account, in place; a term of 0 does not begin an entry."""
    for name, term in terms.items():
        if term:
            account[name] = account.get(name, 0.0) + term * times


def total(account: Mapping[str, float]) -> float:
    """Return the sum of all terms."""
    return sum(account.values())


def flow_samples(specs: Specs) -> int:
    """Return how many samples SynFlow's pass stands for: one, and two time steps of one in a recurrent model."""
    return 2 if any(spec.kind == "recurrent" for spec in specs.values()) else 1


class CountingProbe:
    """A probe that counts the passes which a method takes before training.

    Each call is a forward and a backward pass over the probe's samples (``probe.samples``, 1 if it does not say),
    at the sets of the parameters that it is given, with the gradient on all that they store: SNIP's one pass at the
    dense model, SynFlow's rounds at their shrinking supports.

    Parameters
    ----------
    probe : Probe
        The one that answers.
    specs : mapping of str to ParamSpec

    Attributes
    ----------
    terms : dict of str to float
        What was counted so far: ``"scoring"``.
    """

    def __init__(self, probe: Probe, specs: Specs) -> None:
        self.probe = probe
        self.specs = specs
        self.terms: Terms = {}

    def loss_and_grads(self, params: Params, **options: Any) -> tuple[float, Grads]:
        """Ask the probe, and count a pass over its batch."""
        self._count(params, getattr(self.probe, "samples", 1))
        return self.probe.loss_and_grads(params, **options)

    def flow(self, params: Params, **options: Any) -> tuple[float, Grads]:
        """Ask the probe, and count a pass of :func:`flow_samples`."""
        self._count(params, flow_samples(self.specs))
        return self.probe.flow(params, **options)

    def _count(self, params: Params, samples: int) -> None:
        counts = {name: values_of(params[name]).size for name in multiplied(self.specs) if name in params}
        add(self.terms, {"scoring": step(self.specs, counts, counts, samples)})
