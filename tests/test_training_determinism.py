"""The same seed gives the same bits, whatever the number of threads; another seed gives others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from refimpl.kernels import dense, threads
from refimpl.kernels.cpu import plan
from refimpl.testing.training import tiny_config, tiny_corpus
from refimpl.training.config import Config
from refimpl.training.loop import Run
from refimpl.training.state import pack

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "static": {},
    "set": {},
    "selfish": {"conventions": "selfish-authors"},
    "rigl": {"interval": 3, "end_fraction": 1.0},
    "topkast": {"refresh": 3, "backward_sparsity": 0.3},
}
STEPS = 10


@pytest.fixture(autouse=True)
def _shared_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let small work be shared, and dense products be cut into several blocks."""
    monkeypatch.setattr(dense, "_BLOCK_FLOPS", 1 << 16)
    monkeypatch.setattr(plan, "WORTH_SHARING", 2e6)
    before = threads.get()
    yield
    threads.set_count(before)


def config_of(method: str, **tables: Any) -> Config:
    """Return a run of ten steps in four epochs of three, large enough that the kernels share out their work."""
    return tiny_config(
        dtype="float32",
        model={
            "embedding_size": 96, "hidden_size": 96, "layers": 1,
            "dropout_embedding": 0.1, "dropout_input": 0.2, "dropout_output": 0.2, "weight_drop": 0.2,
        },
        method={"name": method, "sparsity": 0.4, **METHODS[method]},
        optimizer={"name": "sgd", "lr": 5.0, "momentum": 0.5, "clip": 0.25},
        training={"epochs": 4, "batch_size": 40, "bptt": 3, "max_steps": STEPS, **tables},
    )  # fmt: skip


def bits(config: Config) -> dict[str, bytes]:
    """Train, and return the bytes of everything that the run then holds."""
    run = Run(config, tiny_corpus(vocabulary=150, train=40 * 10))
    assert run.train() == "finished"
    arrays, meta = pack(run.state, run.trainer.method)
    return {name: array.tobytes() for name, array in arrays.items()} | {"meta": repr(meta).encode()}


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_changes_no_bit(method: str) -> None:
    one, *others = (bits(config_of(method, threads=count)) for count in (1, 2, 3))
    for other in others:
        assert other.keys() == one.keys()
        assert not [name for name in one if other[name] != one[name]]


@pytest.mark.parametrize("method", METHODS)
def test_another_seed_gives_another_run(method: str) -> None:
    config = config_of(method)
    tables = config.to_dict()
    one, other = bits(config), bits(Config.from_dict({**tables, "seed": tables["seed"] + 1}))
    moved = {name for name in one if name.endswith("/values") and "bias" not in name}
    assert moved
    assert all(one[name] != other[name] for name in moved)
    supports = {name for name in one if name.endswith("/indices")}
    assert bool(supports) == (method not in ("dense", "topkast"))
    assert all(one[name] != other[name] for name in supports)


def test_the_work_is_really_shared() -> None:
    """A guard of this file: these shapes reach the places where kernels cut their work."""
    from refimpl.kernels.cpu.lstm import _recurrent_chunks
    from refimpl.kernels.cpu.plan import chunk_count

    threads.set_count(2)
    run = Run(config_of("static"), tiny_corpus(vocabulary=150, train=40 * 10))
    weight: Any = run.state.params["rnn.weight_hh_l0"]
    assert _recurrent_chunks(weight, 40) == 2
    assert chunk_count(2.0 * weight.nnz * 40 * 3) > 1
    assert dense._BLOCK_FLOPS < 2 * (4 * 96) * 96 * (40 * 3)
