"""Models: compositions of layers, by name.

=====================  =================================================================================
name                   what it is
=====================  =================================================================================
``language-model``     `LanguageModel`: embedding, stacked LSTM, decoder
``mlp``                `MLP`: linear maps with rectifiers between them, softmax cross-entropy
=====================  =================================================================================
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP

__all__ = ["MLP", "MODELS", "LanguageModel", "make_model"]

MODELS: Mapping[str, type[LanguageModel] | type[MLP]] = {"language-model": LanguageModel, "mlp": MLP}
"""For each name, the class."""


def make_model(name: str, **options: Any) -> LanguageModel | MLP:
    """Return the model of this name.

    Parameters
    ----------
    name : str
        One of `MODELS`.
    **options
        Attributes of its class.

    Raises
    ------
    ValueError
        If there is no such model or option, or an option's value is not accepted.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}{_nearest(name, MODELS)}; the names are {', '.join(MODELS)}")
    known = [field.name for field in dataclasses.fields(MODELS[name])]
    for option in options:
        if option not in known:
            near = _nearest(option, known)
            raise ValueError(f"{name} has no option {option!r}{near}; its options are {', '.join(known)}")
    return MODELS[name](**options)


def _nearest(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
