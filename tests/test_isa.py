"""The kernels on processors without AVX-512, and without AVX and FMA: the compiler is told that it runs on one.

Without ``NUMBA_CPU_FEATURES`` Numba adds what this machine has to what the named processor has.
"""

from __future__ import annotations

import json
import platform

import pytest
from child_processes import run

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="these are names of x86 processors"
)

# One panel width for each type, so that each kernel is compiled but twice; several panels, tiles and empty lines.
CHILD = """
import json, re, sys, time
import numpy as np
from refimpl.kernels import cpu
from refimpl.kernels.cpu import cache, runtime
from refimpl.kernels.cpu import conv
from refimpl.testing.convolutions import ConvCase, check_convolution
from refimpl.testing.kernels import CHECKS, Case
from refimpl.testing.lstm import LSTMCase, check_lstm_backward, check_lstm_forward

begin = time.perf_counter()
for case in (
    Case(40, 33, 0.3, lead=(5,), batch=20, dtype=np.float32),
    Case(70, 600, 0.4, lead=(), batch=7, dtype=np.float64, arrangement="sliced"),
):
    for check in CHECKS:
        check(cpu, case)
check_convolution(conv, ConvCase(((3, 1, 1, 5), (3, 1, 1, 8)), (4, 5), 10, dtype=np.float32))
case = LSTMCase(16, 7, 5, 20, dtype=np.float32)
check_lstm_forward(cpu, case)
check_lstm_backward(cpu, case)

forms = [
    form
    for name, module in list(sys.modules.items()) if name.startswith("refimpl.kernels.cpu")
    for kernel in vars(module).values() if isinstance(kernel, runtime.Kernel)
    for form in (kernel.serial, kernel.parallel)
]
code = "".join(text for form in forms for text in form.inspect_asm().values())
print(json.dumps({
    "seconds": time.perf_counter() - begin,
    "compiled": cache.counts["compiled"],
    "registers": sorted(set(re.findall(r"%([xyz]mm)[0-9]", code))),
    "fused": "vfmadd" in code,
    "library calls": sorted(set(re.findall(r"\\b(?:fma|exp|tanh|log)f?\\b(?!:)", code))),
}))
"""

PROCESSORS = {
    "AVX2 and FMA": ({"NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": ""}, ["xmm", "ymm"], True),
    "SSE2": ({"NUMBA_CPU_NAME": "generic"}, ["xmm"], False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_contract_holds(name, tmp_path):
    """Every product within its bound, in code of that processor, in which no multiply-add is a library call.

    Emulated there, a fused multiply-add takes a hundred times as long as the multiplication and the addition.
    """
    settings, registers, fused = PROCESSORS[name]
    out, _ = run(CHILD, tmp_path, REFIMPL_THREADS="1", **settings)
    found = json.loads(out)
    print(f"{name}: {found['compiled']} kernels compiled and checked in {found['seconds']:.1f} s")
    assert found["compiled"] > 10
    assert found["registers"] == registers
    assert found["fused"] == fused
    assert set(found["library calls"]) <= {"log"}  # of each column's sum of exponentials: once, not for each number
