r"""How authors count a forward pass of the convolutional networks that they publish numbers of.

:mod:`refimpl.training.flops` counts products alone, :math:`\sum_l 2 c_l |A_l|` for :math:`c_l` output positions and
:math:`|A_l|` weights in use. The programs behind published tables add operations that no sparsity removes, so that
their fractions are a little larger:

.. math:: f(A) = \sum_l 2 c'_l |A_l| + r

*AC/DC* (also DPF, from where the program came): :math:`c' = c`, and r has a bias 1 for each output, batch norm 2 for
each number, and, where they are modules of their own, rectifiers 1 for each number and pooling the size of a window for
each output. In its wide residual network both are function calls and go uncounted.

*RigL* (the counter of the MicroNet challenge): a product of n numbers is n multiplications and n − 1 additions, and
every layer has a bias and a rectifier, so r is 1 for each output. Two things are peculiar to it. Where the program pads
an image in a layer of its own before a strided convolution, as in Keras's networks, the counter pads it once more:
ResNet-50's first convolution has 115 x 115 positions, not 112 x 112, and each strided one of MobileNet one more row and
column than it has. And a depthwise convolution is taken for one with a single output channel, so that its r is 1 for
each position.

Both take the backward pass to be twice the forward one. With these rules the numbers come out that the authors'
programs print; a test holds them against each other.

References
----------
Peste et al., "AC/DC", NeurIPS 2021, and Evci et al., "Rigging the lottery", ICML 2020, each with its counting program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from refimpl.training import flops
from refimpl.training.flops import Counts, Specs, Terms
from refimpl.training.planned_sizes import Visit
from refimpl.training.published import Formula
from refimpl.weights import ParamSpec

NETWORKS = ("resnet", "wide-resnet", "mobilenet-v1")
"""The networks that are known here, by their names in a configuration."""


@dataclass(frozen=True)
class Counting:
    """A way to count a forward pass of one network.

    Attributes
    ----------
    whose : str
        Whose program counts so.
    specs : mapping of str to ParamSpec
        The linear maps, with the positions that are counted.
    besides : dict of str to float
        r, by what it is for.
    """

    whose: str
    specs: Specs
    besides: Terms = field(default_factory=dict)

    def forward(self, used: Counts) -> float:
        """Return the operations of a forward pass of one sample."""
        return flops.forward(self.specs, used) + flops.total(self.besides)

    @property
    def dense(self) -> float:
        """The same with all weights in use."""
        return self.forward({name: spec.size for name, spec in self.specs.items()})

    def training(self, formula: Formula, visits: Iterable[Visit]) -> float:
        """Return what training takes, for each sample as the formula counts them, as a fraction of 3 f_D."""
        spent = samples = 0.0
        for (used, graded), exchange, count in visits:
            batches = formula.batches(exchange=exchange)
            products = flops.total(formula.step_terms(self.specs, used, graded, exchange=exchange))
            spent += count * (products + 3 * batches * flops.total(self.besides))
            samples += count * batches
        return spent / (3 * samples * self.dense)


def countings_of(network: str, specs: Specs, others: Specs) -> list[Counting]:
    """Return the ways in which a network was counted; none if it is not known.

    Parameters
    ----------
    network : str
        Its name in a configuration.
    specs, others : mapping of str to ParamSpec
        Its linear maps, in the order of a PyTorch state dict, and its other parameters.
    """
    found = []
    if network in NETWORKS:
        found.append(Counting("AC/DC's authors", specs, _beside_acdc(network, specs, others)))
    if network == "mobilenet-v1" or (network == "resnet" and _large(specs)):
        padded = _padded_twice(network, specs)
        wide = {name: replace(spec, columns_per_sample=padded.get(name, spec.columns_per_sample))
                for name, spec in specs.items()}  # fmt: skip
        found.append(Counting("RigL's authors", wide, {"rectifiers": sum(map(_rectified, wide.values()))}))
    return found


def _beside_acdc(network: str, specs: Specs, others: Specs) -> Terms:
    """Return r of AC/DC's program."""
    biases = [spec for spec in others.values() if spec.kind == "bias"]
    norms = {name: spec for name, spec in others.items() if spec.kind == "norm" and name.endswith(".weight")}
    terms = {"bias": sum(map(_numbers, biases)), "normalisation": 2 * sum(map(_numbers, norms.values()))}
    if network != "wide-resnet":
        after = {name: spec for name, spec in norms.items() if not _in_shortcut(name)}  # no rectifier before a sum
        terms |= {"rectifiers": sum(map(_numbers, after.values())), "pooling": _pooling(network, specs)}
    return terms


def _pooling(network: str, specs: Specs) -> float:
    """Return what averaging over the last image takes, and the maximum over 3 x 3 pixels after a stem of stride 2."""
    *_, last, linear = specs.values()
    pooling = last.columns_per_sample * linear.shape[1]
    if network == "resnet" and _large(specs):
        stem = specs["conv1.weight"]
        pooling += 9 * _numbers(stem) / 4
    return pooling


def _padded_twice(network: str, specs: Specs) -> dict[str, float]:
    """Return the positions of the convolutions whose image RigL's counter pads once more."""
    found: dict[str, float] = {}
    before = math.inf
    for name, spec in specs.items():
        positions = spec.columns_per_sample
        kernel = spec.shape[-1] if spec.kind == "conv" else 1
        if not found and network == "resnet":
            found[name] = (math.isqrt(int(positions)) + kernel // 2) ** 2
        elif network == "mobilenet-v1" and kernel > 1 and positions < before:  # strided
            found[name] = (math.isqrt(int(positions)) + 1) ** 2
        before = positions
    return found


def _rectified(spec: ParamSpec) -> float:
    """Return how many numbers RigL's counter takes a layer to rectify."""
    depthwise = spec.kind == "conv" and spec.shape[1] == 1 and spec.shape[0] > 1
    return spec.columns_per_sample if depthwise else _numbers(spec)


def _numbers(spec: ParamSpec) -> float:
    """Return how many numbers a layer puts out for one sample."""
    return spec.shape[0] * spec.columns_per_sample


def _in_shortcut(name: str) -> bool:
    return "downsample" in name or "shortcut" in name


def _large(specs: Mapping[str, ParamSpec]) -> bool:
    """Tell whether a residual network is one for large images, by its first kernel."""
    return specs["conv1.weight"].shape[-1] == 7
