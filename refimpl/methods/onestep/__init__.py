"""Each rule as a pure function of anyone's dense arrays and masks, for authors of frameworks.

No model, no layer and no run is needed. Everything that a framework draws by itself, or leaves to an unstable sort, can
be handed in, so that two programs can be compared without sharing a random generator; every other choice is a field of
:class:`~refimpl.methods.conventions.Conventions`, and :func:`~refimpl.methods.profiles.profile` has those of other
systems. The floats of a result have the type of the weights that were given: pass float32 arrays to repeat what a
system does in float32.
"""

from refimpl.methods.onestep.masks import exchange_masks
from refimpl.methods.onestep.methods import method_step
from refimpl.methods.onestep.pruning import gmp_sparsity, nm_mask, prune_mask, prune_masks
from refimpl.methods.onestep.result import ArrayGradient, Fate, MaskExchange
from refimpl.methods.onestep.start import allocate, allocate_counts, initial_mask
from refimpl.methods.onestep.timing import drop_fraction, exchange_due

__all__ = [
    "ArrayGradient",
    "Fate",
    "MaskExchange",
    "allocate",
    "allocate_counts",
    "drop_fraction",
    "exchange_due",
    "exchange_masks",
    "gmp_sparsity",
    "initial_mask",
    "method_step",
    "nm_mask",
    "prune_mask",
    "prune_masks",
]
