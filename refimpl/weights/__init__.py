"""Weights: supports, values on them, gradients as promises, and carrying arrays across a change of support."""

from refimpl.weights.carry import KEEP, CarryRule, Exchange
from refimpl.weights.gradient import EmbeddingGrad, Gradient, Grads, LinearGrad, ScaledGrad, SumGrad, add_to
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import (
    SparseWeight,
    Weight,
    as_sparse,
    density_of,
    draw_uniform,
    support_of,
    values_of,
    whole_support,
)
from refimpl.weights.support import Shape, Support, index_dtype

__all__ = [
    "KEEP",
    "CarryRule",
    "EmbeddingGrad",
    "Exchange",
    "Gradient",
    "Grads",
    "LinearGrad",
    "ParamSpec",
    "Params",
    "ScaledGrad",
    "Shape",
    "SparseWeight",
    "SumGrad",
    "Support",
    "Weight",
    "add_to",
    "as_sparse",
    "density_of",
    "draw_uniform",
    "index_dtype",
    "support_of",
    "values_of",
    "whole_support",
]
