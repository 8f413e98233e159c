r"""DeepR, deep rewiring: connections walk at random, and one whose sign would change makes room for another.

Each place p has a sign :math:`s_p = \pm 1` for the whole run, and a parameter :math:`\theta_p`. It is active while
:math:`\theta_p > 0`, and then its weight is :math:`w_p = s_p \theta_p`; otherwise it is dormant, and there is none. In
each step, for the active ones,

.. math::
    \theta \leftarrow \theta - \eta\,\frac{\partial L}{\partial \theta} - \eta\alpha + \sqrt{2 \eta T}\,\nu,
    \qquad \nu \sim \mathcal N(0, 1)

where the gradient's part is the optimizer's.

*Strict.* A connection with :math:`\theta \le 0` becomes dormant and is forgotten, and as many dormant places, drawn
uniformly, become active with :math:`\theta = 10^{-12}`: the count is the same after each step. S = A = B, the stored
values are w, and memory is O(|S|): signs are not stored but computed from the place.

*Soft.* The count is free. Dormant parameters walk on with the noise alone, without gradient and penalty, not below
:math:`\theta_{\min}`, and become active when they cross 0. S = everything: :math:`\theta` of all places is stored, a
dense array, and A = B is where it is positive. If L is constant, the active are exponentially distributed with mean
:math:`T/\alpha` and the dormant ones uniformly, so that a density :math:`\rho` is held by

.. math:: \theta_{\min} = -\frac{1 - \rho}{\rho}\,\frac{T}{\alpha}.

Source: Bellec, Kappel, Maass, Legenstein, "Deep rewiring: training very sparse deep networks", ICLR 2018, Algorithm 1
(strict) and Algorithm 2 (soft).

Deviations
----------
- The paper's step is plain SGD; here any optimizer takes the gradient's part. A place that was dropped and drawn again
  starts from :math:`10^{-12}` like any other; what its optimizer state starts from is the optimizer's convention, and
  ``regrow="reset"`` fits. With "forbid" what has just become dormant is not drawn.
- The authors' program scales its noise as :math:`\eta\,\mathcal N(0, \gamma)`, which is :math:`T = \eta\gamma^2/2`. The
  default T is that of its strict defaults, :math:`\eta = 0.5` and :math:`\gamma = 10^{-5}`.
- That program draws its first places with replacement, so that there are fewer of them than asked; here the count is
  exact (convention ``initial_count``). Growth always is: ``growth_count`` is not read.
- The count is constant in each pool (convention ``pool``), by default in each tensor, as in that program.
- The magnitude that was drawn for a weight is kept, and its sign is that of the place.
- Soft: dormant parameters start uniformly between :math:`\theta_{\min}` and 0, each tensor has the
  :math:`\theta_{\min}` of its own density, and active ones that jump below it are set to it too. Optimizer state of the
  dormant rests until they return.
- Tensors of density 1, and those that are not prunable, are trained as usual, without penalty and noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refimpl.methods.allocation import Allocation, initial_supports
from refimpl.methods.base import BaseMethod, Probe
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.exchange import at_random, move, values_in
from refimpl.methods.pools import Pool, pools_of
from refimpl.rng import generator
from refimpl.weights.carry import CarryRule, Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, as_sparse
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads

AWAKENED = 1e-12
"""θ of a place that has just become active."""


def signs(seed: int, name: str, flat: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """Return the sign of each place of a tensor, without storing any.

    Parameters
    ----------
    seed : int
        Of the run.
    name : str
        The tensor's.
    flat : ndarray of int64
        Flat positions.
    dtype : dtype
        Of the result.

    Returns
    -------
    ndarray, shape (flat.size,)
        ±1, equally likely: the highest bit of the place-th number of a SplitMix64 sequence [1]_ whose start is drawn
        for the tensor.

    References
    ----------
    .. [1] Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    start = generator(seed, f"sign/{name}").integers(1 << 64, dtype=np.uint64)
    z = np.asarray(flat).astype(np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64, as all that follows
    z += start
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return np.where(z >> np.uint64(63), -1.0, 1.0).astype(dtype)  # its last shift and sum leave the highest bit alone


class DeepR(BaseMethod):
    """DeepR; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many places of each tensor are active: always in the strict form, at the start in the soft one.
    penalty : float
        α, at least 0.
    temperature : float
        T, at least 0.
    form : {"strict", "soft"}
    minimum : float, optional
        θ_min of the soft form, below 0; None for what holds the density, which needs α and T above 0.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If an argument is outside its range.
    """

    name = "deepr"

    def __init__(
        self,
        allocation: Allocation,
        *,
        penalty: float = 1e-5,
        temperature: float = 2.5e-11,
        form: Literal["strict", "soft"] = "strict",
        minimum: float | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(replace(conventions, growth_count="exact"))
        for what, value in (("penalty", penalty), ("temperature", temperature)):
            if not 0 <= value < np.inf:
                raise ValueError(f"the {what} of DeepR is {value}; give a finite number of at least 0")
        if form not in ("strict", "soft"):
            raise ValueError(f"the form of DeepR is {form!r}; give 'strict' or 'soft'")
        if minimum is not None and not -np.inf < minimum < 0:
            raise ValueError(f"the least dormant parameter of DeepR is {minimum}; give a finite number below 0")
        if form == "soft" and minimum is None and not penalty * temperature:
            raise ValueError("soft DeepR without a minimum takes it from penalty and temperature; give both above 0")
        self.allocation = allocation
        self.penalty = penalty
        self.temperature = temperature
        self.form = form
        self.minimum = minimum
        self.seed = 0
        self.names: list[str] = []  # the tensors that are sparse
        self.pools: list[Pool] = []
        self.least: dict[str, float] = {}  # θ_min of each tensor, in the soft form
        self._active: dict[str, Support] = {}  # A of the soft form, when it was last asked for

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the places that begin as active ones; remember the seed, from which all signs follow."""
        drawn = initial_supports(specs, self.allocation, seed=seed, conventions=self.conventions)
        self.seed = seed
        self.names = list(drawn)
        self.pools = pools_of(specs, self.names, self.conventions.pool)
        self._active = {}
        if self.form == "strict":
            return drawn
        self.least = {name: self._least(support.density) for name, support in drawn.items()}
        return {}

    def _least(self, density: float) -> float:
        return self.minimum or -(1 - density) / density * self.temperature / self.penalty

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Give each drawn weight the sign of its place; the soft form goes over to θ of all places."""
        if self.form == "soft":
            drawn = initial_supports(specs, self.allocation, seed=seed, conventions=self.conventions)
            return params | {name: self._walkers(name, params[name], drawn[name]) for name in self.names}
        begun = dict(params)
        for name in self.names:
            weight = as_sparse(params[name])
            begun[name] = SparseWeight(weight.support, np.abs(weight.values) * self._signs(name, weight))
        return begun

    def adopt(self, params: Params) -> Params:
        """Refuse: a given weight may lie on the other side of 0 than its place."""
        raise ValueError(
            "DeepR cannot begin with given weights, because the sign of each place is drawn for the run; train it from "
            "the start, or take the weights up with another method"
        )

    def _signs(self, name: str, weight: SparseWeight) -> np.ndarray:
        return signs(self.seed, name, weight.support.flat, weight.dtype)

    def _walkers(self, name: str, weight: Weight, active: Support) -> np.ndarray:
        """Return θ of all places: the drawn magnitude where they are active, below 0 elsewhere."""
        assert isinstance(weight, np.ndarray)
        theta = generator(self.seed, f"dormant/{name}").uniform(self.least[name], 0.0, weight.size).astype(weight.dtype)
        theta[active.flat] = np.abs(weight.reshape(-1)[active.flat])
        return theta.reshape(weight.shape)

    # --- soft: A, and the gradient of θ --------------------------

    def view(self, params: Params) -> Params:
        """Return the weights: in the soft form sθ where θ is positive."""
        if self.form == "strict":
            return params
        seen = dict(params)
        for name in self.names:
            active, theta = self._positive(name, params), params[name]
            assert isinstance(theta, np.ndarray)
            flat = active.flat
            seen[name] = SparseWeight(active, theta.reshape(-1)[flat] * signs(self.seed, name, flat, theta.dtype))
        return seen

    def _positive(self, name: str, params: Params) -> Support:
        """Return where θ is positive; the same object as before if nothing has crossed 0 since."""
        theta = params[name]
        assert isinstance(theta, np.ndarray)
        flat, known = np.flatnonzero(theta > 0), self._active.get(name)
        if known is None or not np.array_equal(known.flat, flat):
            self._active[name] = Support(theta.shape, flat)
        return self._active[name]

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return A: in the soft form the dormant have no gradient."""
        return self._positive(name, params) if self.form == "soft" and name in self.names else None

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Evaluate the gradients, and turn those of w into those of θ where θ is what is stored."""
        pulled = super().pull(params, grads)
        if self.form == "soft":
            for name in self.names:
                pulled[name] = pulled[name] * signs(self.seed, name, self._active[name].flat, pulled[name].dtype)
        return pulled

    # --- the walk ------------------------------------------------

    def adjust(self, params: Params, *, step: int, lr: float, seed: int) -> None:
        """Take the penalty's and the noise's part of the step."""
        for name in self.names:
            weight = params[name]
            if self.form == "strict":
                sparse = as_sparse(weight)
                moved = self._noise(name, sparse.values, step, lr, seed) - lr * self.penalty
                sparse.values[...] += self._signs(name, sparse) * moved
                continue
            assert isinstance(weight, np.ndarray)
            theta = weight.reshape(-1)
            # Active are those that the forward pass of this step saw, wherever the optimizer has moved them since.
            active = self._active[name] if name in self._active else self._positive(name, params)
            theta[active.flat] -= lr * self.penalty
            theta += self._noise(name, theta, step, lr, seed)
            np.maximum(theta, self.least[name], out=theta)

    def _noise(self, name: str, values: np.ndarray, step: int, lr: float, seed: int) -> np.ndarray:
        """Draw a number of variance 2ηT for each value."""
        drawn = generator(seed, f"rewiring/{name}", step).standard_normal(values.size, values.dtype)
        drawn *= np.sqrt(2 * lr * self.temperature)
        return drawn

    # --- strict: the exchange ------------------------------------

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Return True after each step of the strict form; the soft one moves A without an exchange."""
        return self.form == "strict" and bool(self.pools) and not epoch_end

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Let connections whose θ is no longer positive become dormant, and wake as many places at random.

        Only tensors in which there are any are in the result.
        """
        if self.form == "soft":
            return {}
        theta: Params = {}
        for name in self.names:
            weight = as_sparse(params[name])
            theta[name] = SparseWeight(weight.support, weight.values * self._signs(name, weight))
        goes = {pool.label: values_in(pool, theta) <= 0 for pool in self.pools}
        want = {label: int(np.count_nonzero(flags)) for label, flags in goes.items()}
        return move(
            theta,
            [pool for pool in self.pools if want[pool.label]],
            goes=goes,
            want=want,
            grow=at_random(seed, step, self.conventions),
            conventions=self.conventions,
        )

    def values_after(self, name: str, weight: Weight, exchange: Exchange, *, step: int, seed: int) -> np.ndarray:
        """Carry the values across; what has just become active starts next to zero, on the side of its sign."""
        values = exchange.carry(as_sparse(weight).values, CarryRule(regrown="reset"))
        values[exchange.source < 0] = AWAKENED * signs(self.seed, name, exchange.grown, values.dtype)
        return values

    # --- state ---------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, the sparse tensors, the pools, and θ_min."""
        pools = [pool.as_json() for pool in self.pools]
        return {"seed": self.seed, "names": list(self.names), "pools": pools, "least": dict(self.least)}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the state; A follows from θ."""
        self.seed = int(state["seed"])
        self.names = list(state["names"])
        self.pools = [Pool.from_json(saved) for saved in state["pools"]]
        self.least = {name: float(low) for name, low in state["least"].items()}
        self._active = {}
