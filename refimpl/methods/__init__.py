"""Methods of sparse training: rules over supports, one file each."""

from __future__ import annotations

from difflib import get_close_matches

from refimpl.methods.acdc import ACDC
from refimpl.methods.allocation import Allocation, density_from_sparsity
from refimpl.methods.base import BaseMethod, Method
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.deepr import DeepR
from refimpl.methods.dense import Dense
from refimpl.methods.dpf import DPF
from refimpl.methods.dsr import DSR
from refimpl.methods.gmp import GMP
from refimpl.methods.granet import GraNet
from refimpl.methods.grasp import GraSP
from refimpl.methods.imp import IMP
from refimpl.methods.iss import ISS
from refimpl.methods.itop import ITOP
from refimpl.methods.magnitude_init import MagnitudeInit
from refimpl.methods.mest import MEST
from refimpl.methods.movement import Movement
from refimpl.methods.oneshot import OneShot
from refimpl.methods.phases import Phases
from refimpl.methods.powerprop import Powerpropagation
from refimpl.methods.profiles import PROFILES, profile
from refimpl.methods.rigl import RigL
from refimpl.methods.selfish import Selfish
from refimpl.methods.set import SET
from refimpl.methods.snfs import SNFS
from refimpl.methods.snip import SNIP
from refimpl.methods.soft_threshold import STR
from refimpl.methods.srste import SRSTE
from refimpl.methods.static import Static
from refimpl.methods.ste import STE
from refimpl.methods.synflow import SynFlow
from refimpl.methods.topkast import TopKAST

METHODS: dict[str, type[BaseMethod]] = {
    method.name: method
    for method in (
        Dense,
        *(Static, MagnitudeInit, SNIP, GraSP, SynFlow),  # a support chosen before training
        *(OneShot, GMP, IMP, STR, Movement, ISS),  # from dense to sparse
        *(SET, Selfish, RigL, ITOP, DeepR, DSR, SNFS, GraNet, MEST),  # sparse throughout, or nearly so
        ACDC,  # dense and sparse in turn
        *(TopKAST, DPF, STE, SRSTE),  # dense weights, sparse forward pass
    )
}
"""The methods by the names that recipes use; `Powerpropagation` wraps any of them."""


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
    "ACDC",
    "DEFAULT",
    "DPF",
    "DSR",
    "GMP",
    "IMP",
    "ISS",
    "ITOP",
    "MEST",
    "METHODS",
    "PROFILES",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "STE",
    "STR",
    "Allocation",
    "BaseMethod",
    "Conventions",
    "DeepR",
    "Dense",
    "GraNet",
    "GraSP",
    "MagnitudeInit",
    "Method",
    "Movement",
    "OneShot",
    "Phases",
    "Powerpropagation",
    "RigL",
    "Selfish",
    "Static",
    "SynFlow",
    "TopKAST",
    "density_from_sparsity",
    "method_class",
    "profile",
]
