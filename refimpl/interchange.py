"""Parameters in the formats of other programs, and the way back, bit for bit.

========  ===========================================================================================================
torch     a file from ``torch.save``: ``{"state_dict": {name: dense tensor}, "masks": {name: bool tensor}, ...}``,
          names, shapes and gate order as in PyTorch, so that ``module.load_state_dict(torch.load(f)["state_dict"])``
npz       a NumPy archive: ``name`` -> dense array, and ``masks/name`` -> bool array for each sparse weight
scipy     a folder: ``name.npz`` from ``scipy.sparse.save_npz`` (CSR) for each sparse weight, ``dense.npz`` for the
          others, and ``index.json``
========  ===========================================================================================================

A stored entry may be exactly 0. CSR keeps it; a dense array cannot tell it from an entry that is not stored, which
is why the two dense formats hold the masks beside the values. Files from elsewhere have no masks: there, a weight of
two or more axes that holds zeros becomes sparse without those zeros, and everything else stays dense.

Beside the parameters they hold the model's buffers under PyTorch's names: the running statistics of batch norms, and
how many batches they have seen, a whole number.

All three also hold a small dictionary, ``meta``, as JSON: for an exported run its configuration and vocabulary.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from refimpl.extras import require
from refimpl.training.atomic import replacing
from refimpl.weights import Params, SparseWeight, Support, Weight

Format = Literal["torch", "scipy", "npz"]
META = "refimpl.json"
MASKS = "masks/"
INDEX = "index.json"
DENSE = "dense.npz"


class Imported(NamedTuple):
    """What a file held."""

    params: Params
    meta: dict[str, Any]


def export_params(
    params: Params,
    path: str | Path,
    to: Format,
    meta: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Path:
    """Write parameters.

    Parameters
    ----------
    params : dict of str to Weight
        By name.
    path : path-like
        The file; for ``"scipy"`` a folder that is new or empty.
    to : {"torch", "scipy", "npz"}
        The format.
    meta : mapping, optional
        What JSON can hold.
    aliases : mapping of str to str, optional
        Further names of tied weights, which PyTorch's state dicts list twice:
        ``{"decoder.weight": "encoder.weight"}``. Only the torch format has them; they are left out again on the way
        back.

    Raises
    ------
    ValueError
        If the format is unknown, a name cannot be kept, or the folder is not empty.
    MissingExtraError
        For ``"torch"`` without torch.
    OSError
        If it cannot be written.
    """
    path = Path(path)
    for name in params:
        if not name or name in (META, "dense") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"a parameter is called {name!r}; give a name without slashes, and not 'dense'")
    path.parent.mkdir(parents=True, exist_ok=True)
    match to:
        case "torch":
            _write_torch(params, path, dict(meta or {}), dict(aliases or {}))
        case "npz":
            _write_npz(params, path, dict(meta or {}))
        case "scipy":
            _write_scipy(params, path, dict(meta or {}))
        case _:
            raise ValueError(f"there is no format {to!r}; give one of {', '.join(get_args(Format))}")
    return path


def import_params(path: str | Path) -> Imported:
    """Read parameters that `export_params` wrote, or a state dict or archive from elsewhere.

    The ending `.npz` or the content tells the format.

    Raises
    ------
    FileNotFoundError
        If there is nothing at that path.
    ValueError
        If it cannot be understood, or holds something that is not a floating-point array.
    MissingExtraError
        For a torch file without torch.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}; give a .pt or .npz file, or a folder of scipy files")
    if path.is_dir():
        read = _read_scipy
    elif _is_npz(path):
        read = _read_npz
    elif zipfile.is_zipfile(path) or path.suffix in (".pt", ".pth", ".bin"):
        read = _read_torch
    else:
        raise _not_understood(path, "it is no archive, or a truncated one")
    try:
        found = read(path)
    except _NotParametersError:
        raise
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_understood(path, str(error) or type(error).__name__) from error
    for name, weight in found.params.items():
        kind = weight.dtype
        if kind not in (np.float32, np.float64) and not _is_count(weight):
            raise ValueError(f"{name} of {str(path)!r} is {kind}; give float32 or float64")
    if not found.params:
        raise _not_understood(path, "it holds no parameter")
    return found


def _is_count(weight: Weight) -> bool:
    """Tell whether it is a whole number by itself, such as how many batches a batch norm has seen."""
    return isinstance(weight, np.ndarray) and weight.shape == () and weight.dtype.kind in "iu"


# --- dense formats ------------------------------------------------------------------------------------------


def to_dense(params: Params) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return dense arrays by name, and the masks of the weights that are sparse."""
    dense = {name: w.dense() if isinstance(w, SparseWeight) else w for name, w in params.items()}
    return dense, {name: w.support.mask() for name, w in params.items() if isinstance(w, SparseWeight)}


def from_dense(dense: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] | None = None) -> Params:
    """Return parameters from dense arrays: `to_dense` backwards.

    Parameters
    ----------
    dense : mapping of str to ndarray
        The weights.
    masks : mapping of str to ndarray of bool, optional
        The supports of sparse weights; a name that is not there stays dense. Without any masks the zeros decide, see
        the module.

    Raises
    ------
    ValueError
        If a mask has no weight of its name and shape, or a weight is not 0 outside its mask.
    """
    params: Params = {}
    for name, array in dense.items():
        if masks is None:
            sparse = array.ndim >= 2 and not array.all()
            params[name] = SparseWeight.from_dense(array) if sparse else array
        elif name in masks:
            params[name] = _masked(name, array, np.asarray(masks[name]))
        else:
            params[name] = array
    lost = [name for name in masks or {} if name not in dense]
    if lost:
        raise ValueError(f"there is a mask for {lost[0]!r}, but no weight of that name; give both or neither")
    return params


def _masked(name: str, array: np.ndarray, mask: np.ndarray) -> SparseWeight:
    if mask.shape != array.shape or mask.dtype != bool:
        raise ValueError(
            f"the mask of {name!r} is {mask.dtype} of shape {mask.shape}; give bool of the weight's shape {array.shape}"
        )
    # A zero's sign is a bit too, but outside the support there is nothing to keep.
    if array[~mask].any():
        raise ValueError(f"{name!r} holds numbers outside its mask; set them to 0 or widen the mask")
    return SparseWeight.from_dense(array, Support.from_mask(mask))


def _write_npz(params: Params, path: Path, meta: dict[str, Any]) -> None:
    dense, masks = to_dense(params)
    arrays = {**dense, **{MASKS + name: mask for name, mask in masks.items()}, META: np.array(json.dumps(meta))}
    _savez(path, arrays)


def _savez(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an archive as ``numpy.savez`` does, which cannot take arrays called "file" or "allow_pickle"."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _read_npz(path: Path) -> Imported:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    ours = META in arrays
    meta = json.loads(str(arrays.pop(META))) if ours else {}
    masks = {name.removeprefix(MASKS): arrays.pop(name) for name in list(arrays) if name.startswith(MASKS)}
    return Imported(from_dense(arrays, masks if ours or masks else None), meta)


def _is_npz(path: Path) -> bool:
    """Tell an archive of arrays from one of torch's, which is a zip file too."""
    if not zipfile.is_zipfile(path):
        return path.suffix == ".npz"
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _write_torch(params: Params, path: Path, meta: dict[str, Any], aliases: dict[str, str]) -> None:
    torch = require("torch", "crosscheck")
    dense, masks = to_dense(params)
    state = {name: torch.from_numpy(np.require(array, requirements="C")) for name, array in dense.items()}
    state |= {alias: state[name] for alias, name in aliases.items()}
    saved = {
        "state_dict": state,
        "masks": {name: torch.from_numpy(mask) for name, mask in masks.items()},
        "aliases": aliases,
        META: json.dumps(meta),
    }
    with replacing(path) as file:
        torch.save(saved, file)


def _read_torch(path: Path) -> Imported:
    torch = require("torch", "crosscheck")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises what pickle, zipfile or its own reader think of
        raise _not_understood(path, str(error).partition("\n")[0]) from error
    ours = isinstance(found, dict) and META in found
    tensors = found["state_dict"] if isinstance(found, dict) and "state_dict" in found else found
    if not isinstance(tensors, dict) or not all(hasattr(t, "numpy") for t in tensors.values()):
        raise _not_understood(path, "it is not a state dict, name -> tensor")
    aliases = found["aliases"] if ours else {}
    dense = {
        name: tensor.detach().contiguous().numpy().copy() for name, tensor in tensors.items() if name not in aliases
    }
    masks = {name: mask.numpy() for name, mask in found["masks"].items()} if ours else None
    return Imported(from_dense(dense, masks), json.loads(found[META]) if ours else {})


# --- scipy --------------------------------------------------------------------------------------------------


def to_csr(weight: SparseWeight) -> Any:
    """Return a ``scipy.sparse.csr_array`` that shares the values: rows are output units, the rest columns."""
    from scipy.sparse import csr_array

    support = weight.support
    # 32-bit signed positions are what SciPy has where they are enough; ours are narrower and unsigned.
    wide = max(support.nnz, *support.matrix_shape) > np.iinfo(np.int32).max
    kind = np.int64 if wide else np.int32
    parts = (weight.values, support.indices.astype(kind), support.indptr.astype(kind))
    return csr_array(parts, shape=support.matrix_shape)


def from_csr(matrix: Any, shape: tuple[int, ...] | None = None) -> SparseWeight:
    """Return a weight from any SciPy sparse matrix.

    Entries that are stored as 0 stay; those that stand twice are added.
    """
    csr = matrix.tocsr()
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    rows = np.repeat(np.arange(csr.shape[0], dtype=np.int64), np.diff(csr.indptr))
    support = Support(csr.shape if shape is None else shape, rows * csr.shape[1] + csr.indices)
    return SparseWeight(support, csr.data)


def _write_scipy(params: Params, path: Path, meta: dict[str, Any]) -> None:
    from scipy.sparse import save_npz

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is there already; give a folder that is new or empty")
    path.mkdir(exist_ok=True)
    sparse = {name: weight for name, weight in params.items() if isinstance(weight, SparseWeight)}
    for name, weight in sparse.items():
        with replacing(path / f"{name}.npz") as file:
            save_npz(file, to_csr(weight), compressed=False)
    _savez(path / DENSE, {name: weight for name, weight in params.items() if isinstance(weight, np.ndarray)})
    index = {"names": list(params), "shapes": {n: list(w.shape) for n, w in sparse.items()}, "meta": meta}
    with replacing(path / INDEX) as file:  # last: a folder that has it is complete
        file.write(json.dumps(index).encode())


def _read_scipy(path: Path) -> Imported:
    from scipy.sparse import load_npz

    if not (path / INDEX).is_file():
        raise _not_understood(path, f"the folder has no {INDEX}")
    index = json.loads((path / INDEX).read_bytes())
    params: dict[str, Weight] = {}
    try:
        with np.load(path / DENSE, allow_pickle=False) as archive:
            for name in index["names"]:
                if name in index["shapes"]:
                    params[name] = from_csr(load_npz(path / f"{name}.npz"), tuple(index["shapes"][name]))
                else:
                    params[name] = archive[name]
    except FileNotFoundError as error:
        raise _not_understood(path, f"{Path(str(error.filename)).name} is missing") from error
    return Imported(params, index["meta"])


class _NotParametersError(ValueError):
    """The one sentence about a file that cannot be understood."""


def _not_understood(path: Path, why: str) -> ValueError:
    return _NotParametersError(
        f"{str(path)!r} cannot be read as parameters ({why}); give what refimpl export wrote, "
        f"a torch state dict, or an .npz of arrays by name"
    )
