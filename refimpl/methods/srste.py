r"""SR-STE: N:M sparsity learned from scratch, with a decay of what is left out.

With hidden weights :math:`w` and, in each group of M consecutive weights of a row, the mask :math:`m` of the N largest
in magnitude, every step:

.. math::
    G = \frac{\partial L}{\partial (m \odot w)}, \qquad
    w \leftarrow w - \eta\,\bigl(G + \lambda\,(1 - m) \odot w\bigr)

The gradient goes straight through to all weights, as in :mod:`refimpl.methods.ste`. The second term, *sparse-refined*,
lets the weights that are left out shrink, so that the mask changes less often; those in use do not decay by it. It is
part of the gradient and thus enters momentum, and Adam's moments. S = B = everything, dense; A is renewed after every
step. Groups and their order: :mod:`refimpl.methods.nm`.

Source: Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li, "Learning N:M fine-grained structured sparse neural networks from
scratch", ICLR 2021, section 3.2; λ = 2e-4 as in its authors' program.

Deviations
----------
- Every prunable tensor has the pattern; the authors' program converts the layers that one names.
- Ties and groups across rows: see :mod:`refimpl.methods.nm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.nm import Pattern
from refimpl.methods.ste import STE
from refimpl.weights.parameters import Params

if TYPE_CHECKING:
    from refimpl.weights.gradient import Grads


class SRSTE(STE):
    """SR-STE; see the module.

    Parameters
    ----------
    pattern : tuple of int
        (N, M). M must divide the columns of every prunable tensor.
    penalty : float
        λ; with 0 this is STE with the pattern.
    conventions : Conventions
        None of them is read.

    Raises
    ------
    ValueError
        If the pattern is impossible, or the penalty is negative or not finite.
    """

    name = "sr-ste"

    def __init__(self, pattern: Pattern = (2, 4), *, penalty: float = 2e-4, conventions: Conventions = DEFAULT) -> None:
        super().__init__(None, pattern=pattern, conventions=conventions)
        if not 0 <= penalty < np.inf:
            raise ValueError(f"the penalty of SR-STE is {penalty}; give a finite number of at least 0")
        self.penalty = penalty

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Evaluate the gradients everywhere, and add the decay of what is left out."""
        pulled = super().pull(params, grads)
        if self.penalty:
            for name, (used,) in self.chosen(params).items():
                decay = self.dense(name, params[name]) * self.penalty
                decay.reshape(-1)[used.flat] = 0
                pulled[name] = pulled[name] + decay
        return pulled
