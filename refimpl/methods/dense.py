"""Dense training: every weight exists, is used and is trained.

S = A = B = everything, and nothing moves. The baseline against which the sparse methods are measured, and the
upper end of their sparsity axis.

Deviations
----------
None.
"""

from __future__ import annotations

from refimpl.methods.base import BaseMethod


class Dense(BaseMethod):
    """Dense training; see the module."""

    name = "dense"
