r"""Powerpropagation: a reparametrization by which large weights learn faster and small ones stay small.

Trained is :math:`\phi`, used is :math:`w`, with a power :math:`a \ge 1`:

.. math::
    w = \phi\,|\phi|^{a - 1}, \qquad
    \frac{\partial L}{\partial \phi} = \frac{\partial L}{\partial w}\; a\,|\phi|^{a - 1}, \qquad
    \phi_0 = \operatorname{sign}(w_0)\,|w_0|^{1/a}

The gradient of a weight is in proportion to its own magnitude (to the power a − 1), so that more of the weights gather
near zero, where pruning takes them at little cost. At the start the network computes what it would have computed. With
a = 1 nothing changes. The order of magnitudes is that of :math:`|\phi|`, so any method of sparse training can be run
inside, and finds the same places whichever it looks at.

The method inside lives in terms of :math:`\phi`: its weights, thresholds, penalties, noise, snapshots and scores are
those of :math:`\phi`, and so are the gradients that it is given, by the chain rule. Only what the forward pass sees is
:math:`w`. Where nothing is stored, :math:`\phi = 0` and the derivative of :math:`w` vanishes; gradients there are with
respect to :math:`w`, so that growth by gradient has something to rank. Gradients that go straight through to weights
which the forward pass did not use have the factor of the stored :math:`\phi`.

Source: Schwarz, Jayakumar, Pascanu, Latham, Teh, "Powerpropagation: a sparsity inducing weight reparameterisation",
NeurIPS 2021, section 2.

Deviations
----------
- Zero is a fixed point: a connection that grows at 0 has derivative 0 and never learns. The paper combines the
  reparametrization with methods whose weights are all there from the start. Here a grown connection of value 0 begins
  at :math:`\pm g\,\overline{|\phi|}`, with the mean over the tensor's stored entries and g = 0.1 by default: its effect
  is then :math:`g^a` of a typical one, 1 % at a = 2, nearly the network of before, while its gradient has
  :math:`g^{a-1}` of the typical factor, so that it can leave zero before the next exchange. The sign is drawn. A
  connection whose sign is wrong shrinks towards 0 and is dropped by magnitude. What the method inside gives another
  value than 0 keeps it (DeepR's 1e-12 will not learn).
- Only prunable tensors are reparametrized; biases, which no method prunes, stay as they are.
- Adam divides by the gradient's size and so cancels much of the factor. This is left as it is; use SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.methods.base import BaseMethod, Probe, Rewind
from refimpl.rng import generator
from refimpl.weights.carry import Exchange
from refimpl.weights.gradient import ScaledGrad
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, values_of
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads


def powered(phi: np.ndarray, power: float) -> np.ndarray:
    r"""Return :math:`w = \phi |\phi|^{a-1}`."""
    return phi * np.abs(phi) ** (power - 1)


def slope(phi: np.ndarray, power: float) -> np.ndarray:
    r"""Return :math:`dw / d\phi = a |\phi|^{a-1}`."""
    return power * np.abs(phi) ** (power - 1)


def rooted(w: np.ndarray, power: float) -> np.ndarray:
    r"""Return :math:`\phi = \operatorname{sign}(w) |w|^{1/a}`, whose power is ``w``."""
    return np.copysign(np.abs(w) ** (1 / power), w)


def _with_values(weight: Weight, values: np.ndarray) -> Weight:
    return SparseWeight(weight.support, values) if isinstance(weight, SparseWeight) else values


class ChainedGrad:
    r"""The gradient with respect to :math:`\phi`, a promise made of that with respect to :math:`w`.

    Parameters
    ----------
    gradient : Gradient
        With respect to w.
    stored : ndarray or SparseWeight
        φ. Outside its support the gradient is left as it is.
    used : callable
        Returns φ as the forward pass had it: on A its values count, which a method may have moved; called once at most.
    power : float
    """

    def __init__(self, gradient: Gradient, stored: Weight, used: Callable[[], Weight], power: float) -> None:
        self.gradient = gradient
        self.stored = stored
        self.used = used
        self.power = power
        self.shape = gradient.shape

    @cached_property
    def factor(self) -> np.ndarray:
        """The slope at each stored entry, flat."""
        factor = slope(values_of(self.stored).reshape(-1), self.power)
        used = self.used()
        if not isinstance(used, SparseWeight):
            return factor if used is self.stored else slope(used.reshape(-1), self.power)
        if isinstance(self.stored, SparseWeight):
            at = slice(None) if used.support is self.stored.support else self._at(used.support)
        else:
            at = used.support.flat
        factor[at] = slope(used.values, self.power)
        return factor

    def _at(self, support: Support) -> np.ndarray:
        assert isinstance(self.stored, SparseWeight)
        return self.stored.support.positions_of(support.flat)

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        if isinstance(self.stored, SparseWeight):
            return ScaledGrad(self.gradient, self.stored, self.factor).on(support)
        return self.gradient.on(support) * self.factor[support.flat]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (rows, dense block (rows, columns)) in ascending order."""
        if isinstance(self.stored, SparseWeight):
            yield from ScaledGrad(self.gradient, self.stored, self.factor).blocks()
            return
        factor = self.factor.reshape(self.shape[0], -1)
        for rows, block in self.gradient.blocks():
            yield rows, block * factor[rows]

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        if isinstance(self.stored, SparseWeight):
            return ScaledGrad(self.gradient, self.stored, self.factor).dense()
        return self.gradient.dense() * self.factor.reshape(self.shape)


class Powerpropagation(BaseMethod):
    """A method of sparse training, reparametrized; see the module.

    Every question of the protocol goes to the method inside, some of them translated; so do further attributes of it.

    Parameters
    ----------
    inner : BaseMethod
        The method inside.
    power : float
        a, at least 1.
    grown : float
        g: where a connection that grew at 0 begins, as a fraction of the tensor's mean |φ|; above 0.

    Raises
    ------
    ValueError
        If the power is below 1 or not finite, or ``grown`` is not a finite number above 0.
    """

    name = "powerpropagation"

    def __init__(self, inner: BaseMethod, power: float, *, grown: float = 0.1) -> None:
        super().__init__(inner.conventions)
        if not 1 <= power < np.inf:
            raise ValueError(
                f"the power of powerpropagation is {power}; give a finite number of at least 1, such as 2 (1 changes "
                "nothing)"
            )
        if not 0 < grown < np.inf:
            raise ValueError(f"grown weights start at {grown} of the mean magnitude; give a finite number above 0")
        self.inner = inner
        self.power = float(power)
        self.grown = grown
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def to_w(self, params: Params) -> Params:
        """Return parameters with w in place of φ."""
        return self._mapped(params, powered)

    def to_phi(self, params: Params) -> Params:
        """Return parameters with φ in place of w, as weights that were trained elsewhere are taken up."""
        return self._mapped(params, rooted)

    def adopt(self, params: Params) -> Params:
        """Let the method inside take up φ, as it does at the start."""
        return self.inner.adopt(self.to_phi(params))

    def _mapped(self, params: Params, by: Callable[[np.ndarray, float], np.ndarray]) -> Params:
        out = dict(params)
        for name in self.names:
            out[name] = _with_values(params[name], by(values_of(params[name]), self.power))
        return out

    def _chained(self, grads: Grads, params: Params, view: Callable[[], Params]) -> Grads:
        """Return gradients with respect to φ from those with respect to w."""
        seen: list[Params] = []

        def used(name: str) -> Weight:
            if not seen:
                seen.append(view())
            return seen[0][name]

        out = dict(grads)
        for name in self.names:
            gradient = grads.get(name)
            if isinstance(gradient, np.ndarray):
                out[name] = gradient * slope(values_of(used(name)), self.power).reshape(gradient.shape)
            elif gradient is not None:
                out[name] = ChainedGrad(gradient, params[name], partial(used, name), self.power)
        return out

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Begin the method inside, and remember what is reparametrized."""
        self.names = [name for name, spec in specs.items() if spec.prunable]
        return self.inner.supports(specs, seed=seed)

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Turn the drawn weights into φ, and let the method inside start from these, scores and snapshots included."""
        phi = self.to_phi(params)
        return self.inner.start(phi, specs, None if probe is None else _ChainedProbe(self, probe), seed=seed)

    def view(self, params: Params) -> Params:
        """Return w on the A of the method inside."""
        return self.to_w(self.inner.view(params))

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return B of the method inside."""
        return self.inner.gradient_support(name, params)

    def update_support(self, name: str, params: Params) -> Support | None:
        """Return that of the method inside."""
        return self.inner.update_support(name, params)

    def observe(self, params: Params, grads: Grads, *, step: int) -> None:
        """Show the method inside the gradients with respect to φ."""
        self.inner.observe(params, self._chained(grads, params, lambda: self.inner.view(params)), step=step)

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Let the method inside pull the gradients with respect to φ, and add its penalties in terms of φ."""
        return self.inner.pull(params, self._chained(grads, params, lambda: self.inner.view(params)))

    def adjust(self, params: Params, *, step: int, lr: float, seed: int) -> None:
        """Let the method inside move φ."""
        self.inner.adjust(params, step=step, lr=lr, seed=seed)

    def lr_scale(self, name: str) -> float:
        """Return that of the method inside."""
        return self.inner.lr_scale(name)

    def replaces_step(self, step: int) -> bool:
        """Ask the method inside."""
        return self.inner.replaces_step(step)

    def needs_gradient(self, step: int) -> bool:
        """Ask the method inside."""
        return self.inner.needs_gradient(step)

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Ask the method inside."""
        return self.inner.exchange_due(step=step, epoch_end=epoch_end, asgd_triggered=asgd_triggered)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Let the method inside exchange, by φ and by the gradients with respect to φ."""
        if gradients is not None:
            view = partial(self.inner.view, params)
            gradients = self._chained(dict(gradients), params, view)  # type: ignore[assignment]
        return self.inner.exchange(params, step=step, seed=seed, gradients=gradients)

    def values_after(self, name: str, weight: Weight, exchange: Exchange, *, step: int, seed: int) -> np.ndarray:
        """Carry φ across as the method inside does, and let no grown entry begin at 0, from where none learns."""
        values = self.inner.values_after(name, weight, exchange, step=step, seed=seed)
        if self.power == 1 or name not in self.names:
            return values
        stuck = np.flatnonzero((exchange.source < 0) & (values == 0))
        there = np.abs(values_of(weight))
        if stuck.size and there.size:
            sign = generator(seed, f"powerpropagation/{name}", step).choice([-1.0, 1.0], stuck.size)
            values[stuck] = sign * (self.grown * float(there.mean()))
        return values

    def rewind(self, params: Params, *, step: int) -> Rewind | None:
        """Ask the method inside, whose snapshots are of φ."""
        return self.inner.rewind(params, step=step)

    def forgets(self, step: int) -> bool:
        """Ask the method inside."""
        return self.inner.forgets(step)

    def horizon(self, steps: int) -> int:
        """Ask the method inside."""
        return self.inner.horizon(steps)

    def settled(self, step: int) -> bool:
        """Ask the method inside."""
        return self.inner.settled(step)

    def dense_twin(self, step: int) -> bool:
        """Ask the method inside."""
        return self.inner.dense_twin(step)

    def state_dict(self) -> dict[str, Any]:
        """Return what is reparametrized, and the state of the method inside."""
        return {"names": list(self.names), "inner": self.inner.state_dict()}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the method inside."""
        return self.inner.state_arrays()

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up what :meth:`state_dict` and :meth:`state_arrays` returned."""
        self.names = list(state["names"])
        self.inner.load_state_dict(state["inner"], arrays)


class _ChainedProbe:
    """The probe of a method that holds φ: the loss and its gradients are those of φ."""

    def __init__(self, method: Powerpropagation, probe: Probe) -> None:
        self.method = method
        self.probe = probe

    def loss_and_grads(self, params: Params, **options: Any) -> tuple[float, Grads]:
        loss, grads = self.probe.loss_and_grads(self.method.to_w(params), **options)
        return loss, self.method._chained(grads, params, lambda: params)

    def flow(self, params: Params) -> tuple[float, Grads]:
        flow, grads = self.probe.flow(self.method.to_w(params))
        return flow, self.method._chained(grads, params, lambda: params)
