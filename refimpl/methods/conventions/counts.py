"""The counts that the conventions define: how many entries a tensor stores, and how many a drop leaves."""

from __future__ import annotations

from refimpl.methods.conventions.allocation import AllocationConventions
from refimpl.methods.conventions.exchanges import DropConventions
from refimpl.methods.conventions.rounding import Width, in_width, rounded


def stored_at(size: int, sparsity: float, conventions: AllocationConventions, density: float | None = None) -> int:
    """Return how many of ``size`` entries a sparsity stands for; 0 is possible.

    Parameters
    ----------
    size : int
        Entries of the tensor.
    sparsity : float
        From 0 to 1.
    conventions : AllocationConventions
        Of which ``initial_rounding``, ``initial_of``, ``initial_width`` and ``kept_minimum`` are read.
    density : float, optional
        1 − sparsity, where that is what is known; taken as it is where the ones are rounded in float64.
    """
    width, how = _width(conventions), conventions.initial_rounding
    entries = in_width(size, width)
    if conventions.initial_of == "zeros":
        count = size - rounded(in_width(sparsity, width) * entries, how)
    elif conventions.initial_width == "float32":
        count = rounded((1 - in_width(sparsity, width)) * entries, how)
    else:
        count = rounded(in_width(1 - sparsity if density is None else density, width) * entries, how)
    return min(max(count, int(conventions.kept_minimum == "one")), size)


def kept_after(
    stored: int,
    fraction: float,
    conventions: DropConventions,
    *,
    size: int | None = None,
    sparsity: float | None = None,
    minimum: int = 0,
) -> int:
    """Return how many of ``stored`` entries a drop leaves.

    Parameters
    ----------
    stored : int
        Entries of the pool before.
    fraction : float
        Drop fraction, from 0 to 1.
    conventions : DropConventions
        Of which ``drop_of``, ``drop_rounding`` and ``drop_width`` are read.
    size : int, optional
        Places of the pool; needed by the rules that go by its density or sparsity.
    sparsity : float, optional
        That was asked for; needed by ``"kept-of-target"``.
    minimum : int
        Least count.

    Raises
    ------
    ValueError
        If the drop fraction is outside [0, 1], or the rule needs what is not given.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a share {fraction} of {stored} entries cannot be dropped; give a drop fraction from 0 to 1")
    of, how = conventions.drop_of, conventions.drop_rounding
    f, n1 = in_width(fraction, conventions.drop_width), in_width(stored, conventions.drop_width)
    if of == "dropped":
        kept = stored - rounded(f * n1, how)
    elif of == "kept":
        kept = rounded((1 - f) * n1, how)
    elif of == "kept-of-target":
        if size is None or sparsity is None:
            raise ValueError("the convention drop_of='kept-of-target' needs the sparsity asked for; give sparsity")
        kept = rounded((1 - (sparsity + (1 - sparsity) * fraction)) * size, how)
    else:
        if size is None:
            raise ValueError(f"the convention drop_of={of!r} needs to know the places of the pool; give size")
        n = in_width(size, conventions.drop_width)
        if of == "kept-of-density":
            # Written with every bracket: float32 does not associate.
            kept = rounded(n * (1 - (1 - (n1 / n) * (1 - f))), how)
        else:
            absent = in_width(size - stored, conventions.drop_width) / n
            kept = rounded(size * (1 - round(float(f * (1 - absent) + absent), 6)), how)
    return min(max(kept, minimum), stored)


def stored_again(stored: int, size: int, conventions: AllocationConventions) -> int:
    """Return the count that the density of ``stored`` entries stands for, in the precision of the initial count."""
    n = in_width(size, _width(conventions))
    density = in_width(stored, _width(conventions)) / n
    count = rounded(n * (1 - (1 - density)), conventions.initial_rounding)
    return min(max(count, int(conventions.kept_minimum == "one")), size)


def _width(conventions: AllocationConventions) -> Width:
    return "float64" if conventions.initial_width == "float64" else "float32"
