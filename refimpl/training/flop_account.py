"""The running account of a run's operations: what was executed, what is published, and what lies between the two."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.training import flops
from refimpl.training.flops import Counts, Specs, Terms
from refimpl.training.published import Formula

FlopAccount = dict[str, Terms]
"""``"executed"``, ``"published"`` and ``"differences"``, each from terms to operations so far, and ``"samples"``: how
many samples were trained on as each of the two counts them. Plain dictionaries of numbers, which a checkpoint keeps."""


def new_account() -> FlopAccount:
    """Return the account of a run at step 0."""
    return {
        "executed": {},
        "published": {},
        "differences": {},
        "samples": {"executed": 0.0, "published": 0.0},
    }


class StepCounter:
    """Enters training steps into accounts; the terms of a step are worked out once for as long as the sets stay.

    Parameters
    ----------
    formula : Formula
        The published way of counting.
    specs : mapping of str to ParamSpec
    """

    def __init__(self, formula: Formula, specs: Specs) -> None:
        self.formula = formula
        self.specs = specs
        self._known: tuple[object, dict[str, Terms]] = (None, {})

    def add(
        self, account: FlopAccount, used: Counts, graded: Counts, samples: int, whole: Mapping[str, list[str]],
        *, times: int = 1,
    ) -> None:  # fmt: skip
        """Add a step, or ``times`` equal ones, in place; see :func:`refimpl.training.flops.step_terms` for the rest."""
        key = (tuple(used.items()), tuple(graded.items()), tuple((reason, *names) for reason, names in whole.items()))
        if key != self._known[0]:
            self._known = (key, self._for_one_sample(used, graded, whole))
        batch = samples * times
        for kind, terms in self._known[1].items():
            flops.add(account[kind], terms, batch)
        account["samples"]["executed"] += batch
        account["samples"]["published"] += batch * self.formula.batches(exchange="growth" in whole)

    def _for_one_sample(self, used: Counts, graded: Counts, whole: Mapping[str, list[str]]) -> dict[str, Terms]:
        exchange, specs = "growth" in whole, self.specs
        executed = flops.step_terms(specs, used, graded, 1, whole)
        return {
            "executed": executed,
            "published": self.formula.step_terms(specs, used, graded, exchange=exchange),
            "differences": self.formula.differences(specs, used, graded, executed, exchange=exchange),
        }


def add_scoring(account: FlopAccount, terms: Terms) -> None:
    """Add what a method's passes before training took, in place; formulas leave it out."""
    flops.add(account["executed"], terms)
    flops.add(account["differences"], terms)


def fractions(account: FlopAccount, specs: Specs) -> dict[str, float]:
    """Return training operations for a sample as a fraction of dense training's, executed and published.

    Dense training *executes* no gradient of the first layer's input, and is *published* as 3 f_D.
    """
    dense = {name: specs[name].size for name in flops.multiplied(specs)}
    whole = {"executed": flops.step(specs, dense, dense, 1), "published": 3 * flops.forward(specs, dense)}
    found = {}
    for kind, per_sample in whole.items():
        denominator = account["samples"][kind] * per_sample
        found[kind] = flops.total(account[kind]) / denominator if denominator else float("nan")
    return found
