r"""The laws of a layer's forward/backward pair, to run against ours and other people's.

A layer is given as two closures over whatever it needs (names, tokens, a carried state, the step's random
draws), so one checker fits a linear map, a convolution, attention, a loss, and a whole model with its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refimpl.testing.derivatives import complex_slope, extrapolated_slope
from refimpl.weights.gradient import Grads
from refimpl.weights.parameters import Params
from refimpl.weights.sparse import SparseWeight, Weight, support_of, values_of
from refimpl.weights.support import Support

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("refimpl.testing needs Hypothesis; install it with: pip install 'refimpl[test]'") from error

DENSITIES = (0.0, 0.2, 0.5, 0.8)
_EPS = float(np.finfo(np.float64).eps)
_SETTLED = 1e-6  # how well differences must determine a slope that is to be compared


@dataclass(frozen=True)
class Layer:
    r"""A forward/backward pair with one set of parameters and inputs.

    Attributes
    ----------
    forward : callable
        ``forward(params, *inputs) -> (y, cache)``: must accept parameters and inputs other than those below,
        of the same shapes, and always use the same random draws. ``y`` is an array, or a float if the layer
        ends in a loss.
    backward : callable
        ``backward(dy, cache, grads, input_gradient) -> dx``: adds to ``grads`` and returns the gradient of
        the input; a tuple of them if there are several, or anything if there are none. For a loss ``dy``
        is 1.0.
    params : Params
        Dense float64 arrays, best of order one: then no product amplifies rounding much.
    inputs : tuple of ndarray
        Float64 arrays that have a gradient. What has none (tokens, a carried state) belongs to the closures.
    sparse : tuple of str
        The weights that may be sparse.
    same_draws : bool
        Whether random draws do not depend on the support, so that the sparse layer is the masked dense one.
    optional_dx : bool
        Whether ``input_gradient=False`` is understood.
    complex_step : bool
        Whether ``forward`` computes with complex numbers where its weights are dense; then derivatives are
        exact up to rounding. Otherwise they are central differences, extrapolated to step 0.
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[[Any, Any, Grads, bool], Any]
    params: Params
    inputs: tuple[np.ndarray, ...] = ()
    sparse: tuple[str, ...] = ()
    same_draws: bool = True
    optional_dx: bool = True
    complex_step: bool = False


def check_layer(
    make: Callable[..., Layer],
    sizes: Mapping[str, Sequence[Any]],
    *,
    max_examples: int = 15,
    shrink: bool = True,
) -> None:
    """Check a layer against the laws of :func:`check_pair`, over sizes that Hypothesis draws, repeatably.

    Parameters
    ----------
    make : callable
        ``make(rng, **sizes) -> Layer`` with one value of each size; numbers come from ``rng``.
    sizes : mapping of str to sequence
        The values that each size may take, such as ``{"outputs": range(1, 6)}``.
    max_examples : int
        How many layers to try.
    shrink : bool
        Whether to look for a smaller layer that breaks the law, before reporting it.

    Raises
    ------
    AssertionError
        If a law is broken; the message says which, and for which tensor.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    chosen = st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in sizes.items()})

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    @given(chosen, st.sampled_from(DENSITIES), st.integers(0, 2**32 - 1))
    def laws(sizes: dict[str, Any], density: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        check_pair(make(rng, **sizes), density=density, rng=rng)

    laws()


def check_pair(layer: Layer, *, density: float, rng: np.random.Generator) -> None:
    r"""Check one layer with given numbers against the laws.

    With dense weights, with random supports, and with full supports:

    1. *Pure.* Forward changes neither parameters nor inputs and repeats its bits; backward changes no ``dy``,
       and gives the same bits after another forward pass.
    2. *Complete.* Every parameter and every input gets a finite gradient, in its shape; in float32 everything
       is float32.
    3. *Adjoint.* :math:`\langle dy, J v \rangle = \langle J^\top dy, v \rangle` for a random direction
       :math:`v` of every input and every parameter; :math:`J v` by complex step or central differences.
    4. *Adds.* A second backward pass into the same ``grads`` doubles every gradient: tied weights add.
    5. *Optional.* ``input_gradient=False`` returns None and the same gradients of the parameters.
    6. *One promise.* A gradient is the same on a support, in blocks and in full.
    7. *Sparse is masked dense*: output and gradients, outside the support too. At density 1 it is dense.

    Comparisons allow 16 roundings for each number of the layer, relative to the greatest number compared: no
    path through the layer is longer.

    Parameters
    ----------
    layer : Layer
        Its parameters dense.
    density : float
        Of the random supports; 0 leaves them empty.
    rng : numpy.random.Generator
        Draws supports, ``dy`` and directions.

    Raises
    ------
    AssertionError
        If a law is broken; the message says which, and for which tensor.
    """
    check = _Check(layer, rng)
    dense = check.laws(layer.params, "dense")
    check.types()
    if not layer.sparse:
        return
    full = {name: Support.full(layer.params[name].shape) for name in layer.sparse}
    check.same(check.laws(check.with_supports(full), "at density 1"), dense, "at density 1 and dense")
    supports = {name: Support.from_mask(rng.random(layer.params[name].shape) < density) for name in layer.sparse}
    sparse = check.with_supports(supports)
    result = check.laws(sparse, "sparse")
    if layer.same_draws:
        masked: Params = {n: w.dense() if isinstance(w, SparseWeight) else w for n, w in sparse.items()}
        check.same(result, check.run(masked), "sparse and masked dense")


class _Result(NamedTuple):
    """What a forward and a backward pass gave; gradients of parameters in full and on their supports."""

    y: np.ndarray
    dx: tuple[np.ndarray, ...]
    full: dict[str, np.ndarray]
    stored: dict[str, np.ndarray]


class _Check:
    """The laws for one layer; ``dy`` is drawn once, so that results can be compared."""

    def __init__(self, layer: Layer, rng: np.random.Generator) -> None:
        self.layer = layer
        self.rng = rng
        y, _ = layer.forward(layer.params, *layer.inputs)
        self.dy = 1.0 if isinstance(y, float) else rng.standard_normal(y.shape)
        arrays = (*(values_of(w) for w in layer.params.values()), *layer.inputs, np.asarray(y))
        self.rounding = 16 * _EPS * sum(array.size for array in arrays)

    def with_supports(self, supports: Mapping[str, Support]) -> Params:
        """Return the parameters with some of them sparse."""
        params = dict(self.layer.params)
        for name, support in supports.items():
            dense = params[name]
            assert isinstance(dense, np.ndarray), f"{name} must be given dense"
            params[name] = SparseWeight.from_dense(dense, support)
        return params

    def backward(self, cache: Any, grads: Grads, input_gradient: bool = True) -> tuple[np.ndarray, ...]:
        """Run backward, and return the inputs' gradients as a tuple."""
        dx = self.layer.backward(self.dy, cache, grads, input_gradient)
        if not input_gradient:
            assert dx is None, "an input gradient came back although input_gradient=False"
        if not self.layer.inputs or not input_gradient:
            return ()
        return dx if isinstance(dx, tuple) else (dx,)

    def run(self, params: Params, input_gradient: bool = True) -> _Result:
        """Run both passes."""
        y, cache = self.layer.forward(params, *self.layer.inputs)
        grads: Grads = {}
        dx = self.backward(cache, grads, input_gradient)
        return self.result(y, dx, grads, params)

    @staticmethod
    def result(y: Any, dx: tuple[np.ndarray, ...], grads: Grads, params: Params) -> _Result:
        """Evaluate the promises."""
        missing, extra = params.keys() - grads.keys(), grads.keys() - params.keys()
        assert not missing, f"backward gave no gradient of {', '.join(sorted(missing))}"
        assert not extra, f"backward gave a gradient of {', '.join(sorted(extra))}, which are no parameters"
        full = {name: np.array(g if isinstance(g, np.ndarray) else g.dense()) for name, g in grads.items()}
        stored = {name: _stored(grads[name], w) for name, w in params.items()}
        return _Result(np.array(y), tuple(np.array(d) for d in dx), full, stored)

    def close(self, a: np.ndarray, b: np.ndarray, message: str) -> None:
        """Compare within rounding."""
        assert a.shape == b.shape, f"{message}: shapes {a.shape} and {b.shape}"
        error = float(np.abs(a - b).max(initial=0))
        bound = self.rounding * max(1.0, float(np.abs(b).max(initial=0)))
        assert error <= bound, f"{message} differ by {error:.3g}, where rounding explains {bound:.3g}"

    def same(self, a: _Result, b: _Result, what: str) -> None:
        """Compare two results within rounding."""
        self.close(a.y, b.y, f"the outputs {what}")
        for k, (p, q) in enumerate(zip(a.dx, b.dx, strict=True)):
            self.close(p, q, f"the gradients of input {k} {what}")
        for name in a.full:
            self.close(a.full[name], b.full[name], f"the gradients of {name} {what}")

    def laws(self, params: Params, what: str) -> _Result:
        """Check the laws of one pair; return its result."""
        layer = self.layer
        before = [values_of(w).copy() for w in params.values()] + [x.copy() for x in layer.inputs]
        y, cache = layer.forward(params, *layer.inputs)
        first = np.array(y)
        dy = None if isinstance(self.dy, float) else self.dy.copy()
        grads: Grads = {}
        dx = self.backward(cache, grads)
        result = self.result(first, dx, grads, params)
        after = [values_of(w) for w in params.values()] + list(layer.inputs)
        unchanged = all(map(np.array_equal, before, after))
        assert unchanged, f"{what}: forward or backward changed a parameter or an input"
        assert dy is None or np.array_equal(dy, self.dy), f"{what}: backward changed dy"
        self._complete(result, params, what)
        self._repeats(params, result, what)
        self._adjoint(params, result, what)
        self._one_promise(grads, params, what)
        self._adds(params, result, what)
        if layer.optional_dx and layer.inputs:
            without = self.run(params, input_gradient=False)
            for name in params:
                message = f"{what}: the gradients of {name} with and without an input gradient"
                self.close(without.stored[name], result.stored[name], message)
        return result

    def _complete(self, result: _Result, params: Params, what: str) -> None:
        assert len(result.dx) == len(self.layer.inputs), f"{what}: not every input got a gradient"
        tensors: list[tuple[str, Any, np.ndarray]]
        tensors = [(f"input {k}", x, d) for k, (x, d) in enumerate(zip(self.layer.inputs, result.dx))]
        tensors += [(name, w, result.full[name]) for name, w in params.items()]
        for name, tensor, gradient in tensors:
            message = f"{what}: the gradient of {name} has shape {gradient.shape}, not {tensor.shape}"
            assert gradient.shape == tensor.shape, message
            assert np.isfinite(gradient).all(), f"{what}: the gradient of {name} is not finite"

    def _repeats(self, params: Params, result: _Result, what: str) -> None:
        y, cache = self.layer.forward(params, *self.layer.inputs)
        assert np.array_equal(result.y, y), f"{what}: a second forward pass gave other bits"
        other = [x + 1 for x in self.layer.inputs]
        moved = {name: _moved(w, np.ones(values_of(w).shape), 1.0) for name, w in params.items()}
        self.layer.forward(moved, *other)
        grads: Grads = {}
        again = self.result(y, self.backward(cache, grads), grads, params)
        same = all(map(np.array_equal, again.dx, result.dx))
        same &= all(np.array_equal(again.full[name], result.full[name]) for name in params)
        assert same, f"{what}: another forward pass in between changed what backward gives"

    def _adds(self, params: Params, result: _Result, what: str) -> None:
        y, cache = self.layer.forward(params, *self.layer.inputs)
        grads: Grads = {}
        self.backward(cache, grads)
        twice = self.result(y, self.backward(cache, grads), grads, params)
        for name in params:
            message = f"{what}: the gradients of {name} after a second pass, and twice the first,"
            self.close(twice.full[name], 2 * result.full[name], message)
            self.close(twice.stored[name], 2 * result.stored[name], message)

    def _one_promise(self, grads: Grads, params: Params, what: str) -> None:
        for name, gradient in grads.items():
            if isinstance(gradient, np.ndarray):
                continue
            full = gradient.dense()
            blocks = [(rows, block.copy()) for rows, block in gradient.blocks()]
            joined = np.concatenate([block for _, block in blocks]).reshape(full.shape)
            rows = np.concatenate([np.arange(part.start, part.stop) for part, _ in blocks])
            complete = np.array_equal(rows, np.arange(full.shape[0]))
            assert complete, f"{what}: the blocks of {name} leave out rows"
            self.close(joined, full, f"{what}: the gradients of {name} in blocks and in full")
            own, anywhere = support_of(params[name]), Support.from_mask(self.rng.random(full.shape) < 0.5)
            for support in (own, anywhere):
                picture = full.reshape(-1)[support.flat]
                message = f"{what}: the gradients of {name} on a support and in full"
                self.close(gradient.on(support).reshape(-1), picture, message)

    def _adjoint(self, params: Params, result: _Result, what: str) -> None:
        gradients: list[tuple[str | int, np.ndarray]] = [*result.stored.items(), *enumerate(result.dx)]
        for where, gradient in gradients:
            v = self.rng.standard_normal(gradient.shape)
            v /= max(float(np.linalg.norm(v)), 1e-300)
            name = where if isinstance(where, str) else f"input {where}"
            self._compare_slope(params, where, v, gradient, f"{what}: the gradient of {name}")

    def _compare_slope(
        self, params: Params, where: str | int, v: np.ndarray, gradient: np.ndarray, message: str
    ) -> None:
        def phi(t: complex) -> Any:
            """Move one tensor by ``t`` along ``v``; all are complex if ``t`` is."""
            moved = {name: _moved(w, v if name == where else None, t) for name, w in params.items()}
            inputs = (_moved(x, v if k == where else None, t) for k, x in enumerate(self.layer.inputs))
            y, _ = self.layer.forward(moved, *inputs)
            return np.sum(y * self.dy)

        inner = float(gradient.reshape(-1) @ v.reshape(-1))
        if self.layer.complex_step and not any(isinstance(w, SparseWeight) for w in params.values()):
            slope, bound = complex_slope(phi), 0.0
        else:
            slope, bound = extrapolated_slope(phi, self.rounding)
            assert bound <= _SETTLED * max(1.0, abs(slope)), (
                f"{message} cannot be checked: differences settle only to {bound:.3g}; is the layer smooth?"
            )
        bound += self.rounding * max(1.0, float(np.abs(gradient).max(initial=0)))
        assert abs(slope - inner) <= bound, (
            f"{message} is {inner:.9g} along a random direction, where the output changes by {slope:.9g} "
            f"(bound {bound:.3g})"
        )

    def types(self) -> None:
        """In float32 everything is float32."""
        narrow: Params = {name: values_of(w).astype(np.float32) for name, w in self.layer.params.items()}
        inputs = tuple(x.astype(np.float32) for x in self.layer.inputs)
        single = _Check(replace(self.layer, params=narrow, inputs=inputs), self.rng)
        if not isinstance(single.dy, float):
            single.dy = single.dy.astype(np.float32)
        result = single.run(narrow)
        arrays = {"the output": result.y} if not isinstance(single.dy, float) else {}
        arrays |= {f"the gradient of input {k}": d for k, d in enumerate(result.dx)}
        arrays |= {f"the gradient of {name}": g for name, g in result.full.items()}
        arrays |= {f"the gradient of {name} on a support": g for name, g in result.stored.items()}
        for name, array in arrays.items():
            assert array.dtype == np.float32, f"in float32, {name} is {array.dtype}"


def _stored(gradient: Any, weight: Weight) -> np.ndarray:
    """Return a gradient's numbers, in the shape of the weight's."""
    numbers = gradient if isinstance(gradient, np.ndarray) else gradient.on(support_of(weight))
    return np.array(numbers).reshape(values_of(weight).shape)


def _moved(weight: Any, v: np.ndarray | None, t: complex) -> Any:
    """Return a weight or an input moved by ``t`` along ``v``, complex if ``t`` is."""
    values = values_of(weight)
    values = values.astype(np.result_type(values, np.complex64)) if isinstance(t, complex) else values.copy()
    if v is not None:
        values += t * v
    return SparseWeight(weight.support, values) if isinstance(weight, SparseWeight) else values
