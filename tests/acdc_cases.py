"""What the tests of AC/DC share."""

from __future__ import annotations

from refimpl.methods.phases import Phases

STEPS = 6
"""Of an epoch."""
EPOCHS = 8
TURNS = Phases((1, 3, 6), (2, 5))
