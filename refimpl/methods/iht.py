r"""k-IHT, iterative hard thresholding, by itself: on a sparse least-squares problem whose answer is known.

.. math::
    f(\theta) = \frac1{2n} \lVert A \theta - y \rVert^2, \qquad
    \theta_{t+1} = T_k(\theta_t - \eta\, g_t), \qquad \mathbb E\,g_t = \nabla f(\theta_t)

:math:`T_k` keeps the k entries of largest magnitude and sets the others to 0; y = A θ* with k* entries of θ* that are
not 0. AC/DC is this iteration with the projection at phase boundaries alone: :func:`alternate`.

What is predicted of it can be seen here, with H = AᵀA / n, of largest eigenvalue L, and η = 1/L:

*linear convergence*
    Where two successive iterates have one support S, and S holds that of θ*, :math:`\theta_{t+1} - \theta^* =
    (I - \eta H_{SS}) (\theta_t - \theta^*)` on it: f falls by the factor :math:`(1 - \mu_S/L)^2` at least, with the
    smallest eigenvalue :math:`\mu_S` of :math:`H_{SS}`.
*support recovery*
    The iterates' support comes to hold that of θ*, if k ≥ k* and the problem is well enough conditioned.
*a floor in proportion to the noise's variance*
    With :math:`\mathbb E \lVert g - \nabla f \rVert^2 = \sigma^2`, f settles at a multiple of :math:`\sigma^2`: twice
    the noise, from the same draws, puts the iterates twice as far from θ*, whatever other entries :math:`T_k` chooses,
    as long as no entry of θ* is so small that it is lost in the noise.

Source: Blumensath, Davies, "Iterative hard thresholding for compressed sensing", Applied and Computational Harmonic
Analysis 2009; its stochastic form, as AC/DC's theory has it, in Peste et al., "AC/DC", NeurIPS 2021.

Deviations
----------
- Of equal magnitudes :math:`T_k` keeps the lower positions.
- AC/DC's theorem bounds the iterations and the floor by constants of f, for k above k* by a factor that grows with its
  conditioning. None of these constants is used here; what is said above follows from the iteration itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refimpl.methods.drop import keep_largest
from refimpl.methods.phases import Kind


def hard_threshold(theta: np.ndarray, k: int) -> np.ndarray:
    """Return T_k(θ): the k entries of largest magnitude, of equal ones those at lower positions, and 0 elsewhere.

    Raises
    ------
    ValueError
        If k is not in 0..θ.size, or an entry is NaN.
    """
    _require_count(k, theta.size)
    out = np.zeros_like(theta)
    kept = keep_largest(np.abs(theta), k)
    out[kept] = theta[kept]
    return out


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """Sparse least squares: y = A θ*, where all but a few entries of θ* are 0.

    Attributes
    ----------
    design : ndarray, shape (n, d)
        A.
    truth : ndarray, shape (d,)
        θ*.
    """

    design: np.ndarray
    truth: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, *, rows: int = 400, size: int = 200, nonzero: int = 10) -> LeastSquares:
        """Draw a problem: A is normal, and so are the entries of θ* at places drawn without replacement.

        Raises
        ------
        ValueError
            If θ* cannot have so many entries, or there are fewer rows than unknowns.
        """
        if not 1 <= nonzero <= size <= rows:
            raise ValueError(
                f"{rows} rows, {size} unknowns and {nonzero} of them not zero; give 1 <= nonzero <= size <= rows"
            )
        truth = np.zeros(size)
        truth[rng.choice(size, nonzero, replace=False)] = rng.standard_normal(nonzero)
        return cls(rng.standard_normal((rows, size)), truth)

    @cached_property
    def hessian(self) -> np.ndarray:
        """H = AᵀA / n, shape (d, d)."""
        return self.design.T @ self.design / len(self.design)

    @cached_property
    def spectrum(self) -> np.ndarray:
        """Eigenvalues of H, ascending; the last is L."""
        return np.linalg.eigvalsh(self.hessian)

    @property
    def lr(self) -> float:
        """η = 1/L."""
        return 1.0 / float(self.spectrum[-1])

    def loss(self, theta: np.ndarray) -> float:
        """Return f(θ), whose least value is 0."""
        residual = self.design @ (theta - self.truth)
        return 0.5 * float(residual @ residual) / len(residual)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Return ∇f(θ) = H(θ − θ*)."""
        return self.design.T @ (self.design @ (theta - self.truth)) / len(self.design)

    def recovered(self, theta: np.ndarray) -> bool:
        """Tell whether the support of θ holds that of θ*."""
        return bool((theta[self.truth != 0] != 0).all())

    def rate(self, theta: np.ndarray) -> float:
        """Return (1 − μ_S/L)², the factor by which f falls in a step at least once the support S of θ stays."""
        on = np.flatnonzero(theta)
        return float((1 - np.linalg.eigvalsh(self.hessian[np.ix_(on, on)])[0] * self.lr) ** 2)


@dataclass(frozen=True, eq=False)
class Path:
    """The iterates of a run.

    Attributes
    ----------
    losses : ndarray, shape (steps + 1,)
        f at the start and after each step.
    theta : ndarray, shape (d,)
        The last iterate.
    moved : int
        The last step that changed the support, 0 for none.
    """

    losses: np.ndarray
    theta: np.ndarray
    moved: int

    def floor(self, last: int) -> float:
        """Return the mean loss of the last iterates."""
        return float(self.losses[-last:].mean())


def iterate(
    problem: LeastSquares,
    k: int,
    steps: int,
    *,
    variance: float = 0.0,
    rng: np.random.Generator | None = None,
    start: np.ndarray | None = None,
) -> Path:
    """Run k-IHT with η = 1/L.

    Parameters
    ----------
    problem : LeastSquares
    k, steps : int
    variance : float
        σ² = E‖g − ∇f‖²: normal noise of variance σ²/d on each entry of the gradient.
    rng : numpy Generator
        Needed for noise.
    start : ndarray, shape (d,), optional
        θ₀; by default 0.

    Raises
    ------
    ValueError
        If k is impossible, the variance negative, or noise asked for without a generator.
    """
    return _follow(problem, k, [("projected", steps)], variance, rng, start)


def alternate(
    problem: LeastSquares,
    k: int,
    phases: Sequence[tuple[Kind, int]],
    *,
    variance: float = 0.0,
    rng: np.random.Generator | None = None,
    start: np.ndarray | None = None,
) -> Path:
    r"""Run AC/DC by gradient descent with η = 1/L.

    .. math::
        \text{dense:} \quad & \theta \leftarrow \theta - \eta g \\
        \text{compressed:} \quad & \theta \leftarrow T_k(\theta), \quad S \leftarrow \text{the k entries that stay,} \\
            & \text{then } \theta \leftarrow \theta - \eta g_S \text{ in each step}

    Parameters
    ----------
    phases : sequence of (str, int)
        ``("dense", steps)`` or ``("compressed", steps)``, in order.
    problem, k, variance, rng, start
        As in :func:`iterate`, errors too.
    """
    return _follow(problem, k, phases, variance, rng, start)


def _follow(
    problem: LeastSquares,
    k: int,
    phases: Sequence[tuple[str, int]],
    variance: float,
    rng: np.random.Generator | None,
    start: np.ndarray | None,
) -> Path:
    if variance < 0 or (variance > 0 and rng is None):
        raise ValueError(
            f"the variance of the noise is {variance} and rng is {rng}; give at least 0, and rng for noise"
        )
    size, lr = problem.truth.size, problem.lr
    _require_count(k, size)
    deviation = (variance / size) ** 0.5
    theta = np.zeros(size) if start is None else start.copy()
    losses, moved = [problem.loss(theta)], 0
    for kind, steps in phases:
        stays = np.ones(size, bool)
        if kind == "compressed":
            stays[:] = False
            stays[keep_largest(np.abs(theta), k)] = True
        for _ in range(steps):
            before = theta != 0
            theta = np.where(stays, theta, 0)
            g = problem.gradient(theta)
            if rng is not None and variance:
                g += deviation * rng.standard_normal(size)
            theta = theta - lr * np.where(stays, g, 0)
            if kind == "projected":
                theta = hard_threshold(theta, k)
            losses.append(problem.loss(theta))
            if not np.array_equal(theta != 0, before):
                moved = len(losses) - 1
    return Path(np.array(losses), theta, moved)


def _require_count(k: int, size: int) -> None:
    if not 0 <= k <= size:
        raise ValueError(f"k is {k}; give how many of the {size} entries are kept, from 0 to {size}")
