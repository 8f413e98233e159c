"""Whether NumPy's BLAS runs the kernels that this processor is best at.

OpenBLAS chooses its kernels by the processor, once, when it is loaded. A version that is older than the processor, or
``OPENBLAS_CORETYPE`` in the environment, can leave it with AVX2 where there is AVX-512, at half the speed. Only dense
products feel it. The choice is the user's: nothing here changes the environment.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

SETTING = "OPENBLAS_CORETYPE"
_FAST = "SkylakeX"  # OpenBLAS's name of its kernels for AVX-512
_FAST_NEEDS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
_SLOW = frozenset({"haswell", "zen", "sandybridge", "nehalem", "prescott", "core2", "katmai", "generic"})


def blas_hint(kernel: str | None) -> str | None:
    """Return one line of advice to whoever runs the BLAS kernels of this name; None where there are none faster."""
    if (kernel or "").lower() not in _SLOW or not instruction_sets() >= _FAST_NEEDS:
        return None
    chosen = os.environ.get(SETTING)
    why = f"{SETTING} is {chosen}" if chosen else "OpenBLAS does not know this processor"
    return f"{why}; {SETTING}={_FAST}, set before Python starts, makes dense products faster (AVX-512)"


@lru_cache(maxsize=1)
def instruction_sets() -> frozenset[str]:
    """Return the processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()
