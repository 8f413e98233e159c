"""Export and import: every format gives back the same parameters bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.extras import available
from refimpl.interchange import export_params, from_csr, from_dense, import_params, to_csr, to_dense
from refimpl.weights import Params, SparseWeight, Support, Weight

FORMATS = ["npz", "scipy", *(["torch"] if available("crosscheck") else [])]
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)

# Every bit pattern that a number can have, zeros of both signs, infinities and NaN among them.
NUMBERS = {
    np.float32: st.floats(width=32),
    np.float64: st.floats(),
}


@st.composite
def weights(draw: st.DrawFn, dtype: Any) -> Weight:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    values = draw(hnp.arrays(dtype, shape, elements=NUMBERS[dtype]))
    if len(shape) == 1 or draw(st.booleans()):
        return values
    support = Support.from_mask(draw(hnp.arrays(bool, shape)))
    return SparseWeight(support, values.reshape(-1)[support.flat])


@st.composite
def parameters(draw: st.DrawFn) -> Params:
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    names = st.text("abcdefghijklmnop._0123", min_size=1, max_size=12).filter(lambda n: n != "dense" and n.strip("."))
    names |= st.sampled_from(["file", "allow_pickle", "index"])
    return draw(st.dictionaries(names, weights(dtype), min_size=1, max_size=4))


def assert_same(a: Params, b: Params) -> None:
    assert list(a) == list(b)
    for name, x in a.items():
        y = b[name]
        assert type(x) is type(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if isinstance(x, SparseWeight) and isinstance(y, SparseWeight):
            assert x.support == y.support
            x, y = x.values, y.values
        assert isinstance(x, np.ndarray)
        assert isinstance(y, np.ndarray)
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("to", FORMATS)
@given(params=parameters())
@IN_ONE_FOLDER
def test_the_way_there_and_back_keeps_every_bit(to: Any, params: Params, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("files") / "model"
    meta = {"config": {"seed": 2**63}, "vocabulary": "ä \u2028 <eos>"}
    assert export_params(params, path, to, meta) == path
    found = import_params(path)
    assert_same(params, found.params)
    assert found.meta == meta


def stored_zero() -> Params:
    support = Support.from_mask(np.array([[True, False, True], [False, True, False]]))
    return {"w": SparseWeight(support, np.array([0.0, 2.0, -0.0])), "b": np.array([0.0, 1.0])}


@pytest.mark.parametrize("to", FORMATS)
def test_an_entry_that_is_stored_as_zero_stays_stored(to: Any, tmp_path: Path) -> None:
    export_params(stored_zero(), tmp_path / "model", to)
    assert_same(stored_zero(), import_params(tmp_path / "model").params)


def test_numpy_and_scipy_read_the_files_themselves(tmp_path: Path) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    params = stored_zero()
    weight = params["w"]
    assert isinstance(weight, SparseWeight)
    with np.load(export_params(params, tmp_path / "model.npz", "npz"), allow_pickle=False) as archive:
        assert np.array_equal(archive["w"], weight.dense())
        assert np.array_equal(archive["masks/w"], weight.support.mask())
        assert set(archive.files) == {"w", "b", "masks/w", "refimpl.json"}
    folder = export_params(params, tmp_path / "weights", "scipy")
    matrix = sparse.load_npz(folder / "w.npz")
    assert matrix.format == "csr"
    assert matrix.nnz == 3
    assert np.array_equal(matrix.toarray(), weight.dense())


def test_torch_loads_the_state_dict_into_its_own_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from refimpl.models.language_model import LanguageModel

    model = LanguageModel(vocabulary=9, embedding_size=6, hidden_size=6, layers=2, tied=True)
    rng = np.random.default_rng(0)
    supports = {n: Support.from_mask(rng.random(s.shape) < 0.4) for n, s in model.specs().items() if s.prunable}
    params = model.init(0, np.float64, supports)
    path = export_params(params, tmp_path / "model.pt", "torch", aliases={"decoder.weight": "encoder.weight"})

    class Example(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Embedding(9, 6, dtype=torch.float64)
            self.rnn = torch.nn.LSTM(6, 6, 2, dtype=torch.float64)
            self.decoder = torch.nn.Linear(6, 9, dtype=torch.float64)
            self.decoder.weight = self.encoder.weight

    module = Example()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    tokens = rng.integers(0, 9, (5, 3)).astype(np.int32)
    with torch.no_grad():
        hidden, _ = module.rnn(module.encoder(torch.from_numpy(tokens.astype(np.int64))))
        theirs = module.decoder(hidden).numpy().transpose(0, 2, 1)
    ours, _ = model.logits(params, tokens, model.zero_states(3, np.float64))
    # A few dozen additions of numbers below 1, ten layers deep.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
    assert_same(params, import_params(path).params)


def test_a_state_dict_from_elsewhere_is_sparse_where_it_has_zeros(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "full": torch.ones(2, 2), "b": torch.zeros(2)}
    for saved in (state, {"state_dict": state}):
        torch.save(saved, tmp_path / "theirs.pt")
        params, meta = import_params(tmp_path / "theirs.pt")
        assert meta == {}
        assert isinstance(params["w"], SparseWeight)
        assert params["w"].nnz == 2
        assert isinstance(params["full"], np.ndarray)
        assert isinstance(params["b"], np.ndarray)
    np.savez(tmp_path / "theirs.npz", w=state["w"].numpy(), b=state["b"].numpy())
    params, _ = import_params(tmp_path / "theirs.npz")
    assert isinstance(params["w"], SparseWeight)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    entries=st.lists(st.tuples(st.integers(0, 35), st.sampled_from([1.0, -1.0, 0.5])), max_size=20),
)
def test_any_scipy_matrix_becomes_a_weight(shape: tuple[int, int], entries: list[tuple[int, float]]) -> None:
    from scipy.sparse import coo_array, csc_array, csr_array

    at = np.array([place % (shape[0] * shape[1]) for place, _ in entries], int)
    values = np.array([value for _, value in entries])
    coo = coo_array((values, (at // shape[1], at % shape[1])), shape=shape)  # unsorted, and places may stand twice
    rows = np.argsort(at // shape[1], kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(at // shape[1], minlength=shape[0]))])
    raw = csr_array((values[rows], (at % shape[1])[rows], indptr), shape=shape)
    for matrix in (coo, csc_array(coo), raw):
        expected = matrix.toarray()
        weight = from_csr(matrix)
        assert np.array_equal(weight.dense(), expected)
        assert weight.nnz == len(set(at.tolist()))
        assert np.array_equal(matrix.toarray(), expected)


@given(weights(np.float64))
def test_csr_and_dense_arrays_are_the_weight(weight: Weight) -> None:
    if isinstance(weight, SparseWeight):
        matrix = to_csr(weight)
        assert matrix.has_canonical_format
        np.testing.assert_array_equal(matrix.toarray().reshape(weight.shape), weight.dense())
        assert_same({"w": weight}, {"w": from_csr(matrix, weight.shape)})
    assert_same({"w": weight}, from_dense(*to_dense({"w": weight})))


def test_what_is_refused(tmp_path: Path) -> None:
    good: Params = {"w": np.eye(2)}
    for name in ("a/b", "", "dense", "refimpl.json"):
        with pytest.raises(ValueError, match="give a name"):
            export_params({name: np.eye(2)}, tmp_path / "x", "npz")
    with pytest.raises(ValueError, match="there is no format 'onnx'"):
        export_params(good, tmp_path / "x", "onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export_params(good, tmp_path / "full", "scipy")
    with pytest.raises(ValueError, match=r"has no index\.json"):
        import_params(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="there is no"):
        import_params(tmp_path / "absent")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="cannot be read as parameters"):
        import_params(tmp_path / "text.npz")
    np.savez(tmp_path / "ints.npz", w=np.arange(3))
    with pytest.raises(ValueError, match=r"w of .* is int64; give float32 or float64"):
        import_params(tmp_path / "ints.npz")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="holds no parameter"):
        import_params(tmp_path / "empty.npz")


def test_a_file_whose_parts_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="numbers outside its mask"):
        from_dense({"w": np.ones((2, 2))}, {"w": np.eye(2, dtype=bool)})
    with pytest.raises(ValueError, match=r"bool of the weight's shape \(2, 2\)"):
        from_dense({"w": np.ones((2, 2))}, {"w": np.ones(4, bool)})
    with pytest.raises(ValueError, match="a mask for 'v', but no weight"):
        from_dense({"w": np.ones((2, 2))}, {"v": np.eye(2, dtype=bool)})
    folder = export_params(stored_zero(), tmp_path / "weights", "scipy")
    (folder / "w.npz").unlink()
    with pytest.raises(ValueError, match=r"w\.npz is missing"):
        import_params(folder)
    (folder / "index.json").write_text(json.dumps({"names": ["w"]}))
    with pytest.raises(ValueError, match="cannot be read as parameters"):
        import_params(folder)


@pytest.mark.parametrize("to", FORMATS)
def test_a_truncated_file_is_refused(to: Any, tmp_path: Path) -> None:
    path = export_params({"w": np.ones((40, 40))}, tmp_path / "model", to)
    file = path / "dense.npz" if to == "scipy" else path
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match="cannot be read as parameters"):
        import_params(path)
