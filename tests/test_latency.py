"""What starting costs: nothing is imported before it is needed, and nothing is compiled twice. No time is asserted."""

from __future__ import annotations

import json

import pytest
from child_processes import run

LOADED = "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
HEAVY = {"numpy", "scipy", "numba", "llvmlite", "threadpoolctl", "tqdm", "torch", "matplotlib", "hypothesis"}

IMPORTED = {
    "import refimpl": set(),
    "import refimpl.cli": set(),
    "from refimpl.cli.arguments import make_parser; make_parser()": set(),
    "import refimpl.kernels": {"numpy"},
    "import refimpl.weights": {"numpy"},
    "from refimpl import Support, SparseWeight, set_threads": {"numpy"},
    "from refimpl import load_recipe; load_recipe('selfish-lstm')": {"numpy"},
    "import refimpl.training.trainer": {"numpy"},
}


@pytest.mark.parametrize("code", IMPORTED)
def test_importing_takes_no_library_that_is_not_needed_yet(code):
    out, said = run(code + LOADED)
    assert HEAVY.intersection(json.loads(out)) <= IMPORTED[code]
    assert said == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_imports_none_of_them(arguments):
    code = f"""
from refimpl.cli import main
try:
    main({arguments})
except SystemExit as stop:
    assert not stop.code
"""
    out, _ = run(code + LOADED)
    assert not HEAVY.intersection(json.loads(out.splitlines()[-1]))


STEP = """
import json, sys
import numpy as np
from refimpl.kernels.cpu import cache
from refimpl.methods import Allocation, Selfish
from refimpl.models.language_model import LanguageModel
from refimpl.optim import SGD
from refimpl.training.trainer import Trainer

trainer = Trainer.begin(
    LanguageModel(50, 8, 8, 2), Selfish(Allocation(0.5), 0.5, total_steps=10), SGD(), lambda step, epoch: 1.0,
    batch=4, dtype=np.float32, seed=0, clip=0.25,
)
window = np.random.default_rng(0).integers(0, 50, (2, 5, 4)).astype(np.int32)
loss = trainer.step(*window).loss
print(json.dumps([loss.hex(), cache.counts["compiled"], cache.counts["loaded"], sorted(sys.modules)]))
"""


def test_the_first_step_of_a_later_process_compiles_nothing_and_needs_no_compiler(tmp_path):
    """Numba makes all that it can compile known to its compiler before it compiles anything; SciPy comes with that."""
    first, compiled, loaded, _ = json.loads(run(STEP, tmp_path)[0])
    assert compiled > 0 == loaded
    second, *counts, modules = json.loads(run(STEP, tmp_path)[0])
    assert second == first
    assert counts == [0, compiled]
    assert "numba" in modules
    assert not {"numba.np.arraymath", "scipy.linalg", "scipy.sparse", "torch", "threadpoolctl"}.intersection(modules)
