"""Methods of sparse training: rules over supports, one file each."""

from __future__ import annotations

from difflib import get_close_matches

from refimpl.methods.allocation import Allocation, density_from_sparsity
from refimpl.methods.base import BaseMethod, Method
from refimpl.methods.conventions import DEFAULT, PROFILES, Conventions, profile
from refimpl.methods.dense import Dense
from refimpl.methods.rigl import RigL
from refimpl.methods.selfish import Selfish
from refimpl.methods.set import SET
from refimpl.methods.static import Static
from refimpl.methods.topkast import TopKAST

METHODS: dict[str, type[BaseMethod]] = {method.name: method for method in (Dense, Static, SET, RigL, Selfish, TopKAST)}
"""The methods by the names that recipes use."""


def method_class(name: str) -> type[BaseMethod]:
    """Return the method of a name.

    Raises
    ------
    ValueError
        If there is none; the message lists those there are and names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no method {name!r}; {hint}there are {', '.join(METHODS)}")


__all__ = [
    "DEFAULT",
    "METHODS",
    "PROFILES",
    "SET",
    "Allocation",
    "BaseMethod",
    "Conventions",
    "Dense",
    "Method",
    "RigL",
    "Selfish",
    "Static",
    "TopKAST",
    "density_from_sparsity",
    "method_class",
    "profile",
]
