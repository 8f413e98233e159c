"""Checkpoints: named arrays and a small dictionary in one ``.npz`` file, without pickle.

The file is an ordinary NumPy archive (`numpy.load` reads it). Beside the arrays it holds one text, ``meta``:
JSON with the schema's version, the names of the arrays and the caller's dictionary. A parameter is stored as

=====================  ==================================================================================
``name/values``        the numbers: a dense array, or one for each stored entry of a sparse weight
``name/indices``       sparse only: flat positions in C order, ascending, in the narrowest unsigned type
``name/shape``         sparse only: shape of the weight
``name/slot/<slot>``   what the optimizer remembers, aligned with ``values`` or with a shape of its own
=====================  ==================================================================================
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.training.atomic import replacing
from refimpl.weights.parameters import Params
from refimpl.weights.sparse import SparseWeight, Weight
from refimpl.weights.support import Support

SCHEMA = 1
META = "meta"
Slots = dict[str, dict[str, np.ndarray]]
"""What the optimizer remembers: parameter name, then slot name, then the array."""

# What zipfile, zlib and NumPy's reader raise on bytes that are not what they should be.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, EOFError, RuntimeError, OSError,
    OverflowError, SyntaxError, TypeError, IndexError,
)  # fmt: skip


def save(path: str | Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; it is there in full or not at all.

    The same state gives the same bytes: no time or host is in the file.

    Parameters
    ----------
    path : path-like
        Name of the file, as a rule ending in ``.npz``. Its folder must exist.
    arrays : mapping of str to ndarray
        Any shapes and types but Python objects. The name ``"meta"`` is taken.
    meta : mapping
        What JSON can hold; NaN and infinities too.

    Raises
    ------
    ValueError
        If an array holds Python objects or has a name that an archive cannot keep.
    OSError
        If the file cannot be written, such as on a full disk; an older file of that name is untouched.
    """
    for name, array in arrays.items():
        if not name or name == META or "\0" in name or "\\" in name:
            raise ValueError(f"an array of a checkpoint is called {name!r}; give another name than that")
        if np.asarray(array).dtype.hasobject:
            raise ValueError(f"{name!r} holds Python objects; a checkpoint keeps numbers and texts only")
    head = {"schema": SCHEMA, "arrays": sorted(arrays), "meta": dict(meta)}
    text = json.dumps(head, default=_from_numpy, ensure_ascii=True)
    with replacing(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in [(META, np.array(text)), *arrays.items()]:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a checkpoint, checking every byte of it first.

    Returns
    -------
    arrays : dict of str to ndarray
        As they were saved, bit for bit.
    meta : dict
        As JSON gives it back: tuples have become lists.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is truncated or damaged, is no checkpoint, or has another version's schema.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}; give the path of an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checksums first: a damaged header could ask for any memory
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except PermissionError:
        raise
    except _DAMAGE as error:
        raise _unreadable(path, f"is truncated or damaged ({str(error) or type(error).__name__})") from error
    try:
        head = json.loads(str(arrays.pop(META)))
        schema, names, meta = head["schema"], head.get("arrays"), head.get("meta")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unreadable(path, "is no checkpoint of refimpl: it has no proper entry 'meta'") from error
    if schema != SCHEMA:
        raise ValueError(
            f"checkpoint {str(path)!r} has schema {schema!r} and this version of refimpl reads {SCHEMA}; "
            f"use the version that wrote it"
        )
    if names != sorted(arrays) or not isinstance(meta, dict):
        raise _unreadable(path, "is damaged: it does not hold the arrays that it lists")
    return arrays, meta


def pack_params(params: Params, slots: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return parameters and optimizer slots as one flat dictionary of arrays under their canonical names.

    Nothing is copied but the positions; save the result before the next training step.

    Raises
    ------
    ValueError
        If a name contains ``/``, or a slot belongs to no parameter.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, weight in params.items():
        _check_name(name)
        if isinstance(weight, SparseWeight):
            arrays[f"{name}/indices"] = _narrow(weight.support)
            arrays[f"{name}/shape"] = np.array(weight.shape, np.int64)
            arrays[f"{name}/values"] = weight.values
        else:
            arrays[f"{name}/values"] = weight
    for name, of_one in slots.items():
        if name not in params:
            raise ValueError(f"there are optimizer slots for {name!r}, which is not among the parameters")
        for slot, array in of_one.items():
            _check_name(slot)
            arrays[f"{name}/slot/{slot}"] = array
    return arrays


def unpack_params(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Weight], Slots]:
    """Return parameters and slots from arrays under their canonical names: `pack_params` backwards.

    Other arrays of the checkpoint are left alone. Parameters without slots have an empty dictionary of them.

    Raises
    ------
    ValueError
        If the parts of a parameter do not fit together.
    """
    names = [key.removesuffix("/values") for key in arrays if key.endswith("/values") and key.count("/") == 1]
    params: dict[str, Weight] = {}
    slots: Slots = {name: {} for name in names}
    for name in names:
        values = arrays[f"{name}/values"]
        if f"{name}/indices" not in arrays:
            params[name] = values
            continue
        try:
            shape = tuple(int(n) for n in arrays[f"{name}/shape"])
            params[name] = SparseWeight(Support(shape, arrays[f"{name}/indices"]), values)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"parameter {name!r} of the checkpoint does not fit together ({error}); use another one"
            ) from error
    for key, array in arrays.items():
        name, middle, slot = (*key.split("/"), "", "")[:3]
        if middle == "slot" and name in slots:
            slots[name][slot] = array
    return params, slots


def _narrow(support: Support) -> np.ndarray:
    kind = np.uint16 if support.size <= 1 << 16 else np.uint32 if support.size <= 1 << 32 else np.int64
    return support.flat.astype(kind)


def _check_name(name: str) -> None:
    if not name or "/" in name:
        raise ValueError(f"a parameter or slot is called {name!r}; give a name without '/'")


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a checkpoint's meta holds a {type(value).__name__} object; give what JSON can hold")


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(f"checkpoint {str(path)!r} {why}; use an older checkpoint or start the run again")
