r"""Movement pruning: what stays are the weights that training moves away from zero.

Each weight has a score :math:`S`, trained with it from 0. With :math:`G = \partial L / \partial(M \odot W)`:

.. math::
    M &= [S \text{ among the } K(t) \text{ largest of its tensor}] \qquad \text{(hard), or} \qquad
    M = [\sigma(S) > \tau] \qquad \text{(soft)} \\
    \frac{\partial L}{\partial S} &= G \odot W \text{ on all entries}, \qquad
    \frac{\partial L}{\partial W} = G \odot M

so that under plain gradient descent :math:`S = -\eta_S \sum_t G_t \odot W_t`: it grows while a step
:math:`-G` moves W away from 0, and falls while it moves W towards 0, whether or not W is in use. In the hard form
:math:`K(t) = \mathrm{round}(d_t n)` follows the cubic schedule from 1 to the density of the allocation; in the soft
form the penalty :math:`\lambda\,\mathrm{mean}\,\sigma(S)` over all scores drives them down, and at least
:math:`\lfloor 0.005\,n \rfloor + 1` weights of a tensor stay.

The forward pass and the input gradient use A, where M is 1; the weight gradient is needed everywhere, B = S =
everything. M is renewed every ``interval`` steps. Weights outside A keep their values until M takes them up again.

Source: Sanh, Wolf, Rush, "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020, section 4.

Deviations
----------
- The optimizer moves the weights of A alone: where M is 0 the gradient is 0, and neither momentum nor decay moves a
  weight. In the authors' program decay and the moments of Adam do.
- The schedule is in densities and the count is rounded to the nearest; the authors' program cuts it to an integer.
  Of equal scores the lower places stay.
- M is that of the last renewal; with ``interval=1`` it is made from the scores after each step, as in the paper.
- Soft form: τ and λ are constant. The authors' program raises both together, on the cubic schedule, and takes the mean
  of the tensors' means; with tensors of one size that is the same mean.
- An optimizer's weight decay acts on the scores as well; give it none, as the authors do for theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.base import Probe, evaluate
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import keep_largest
from refimpl.methods.hidden import Hidden
from refimpl.methods.logistic import sigmoid
from refimpl.methods.pruning import cubic
from refimpl.weights.sparse import values_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refimpl.weights.gradient import Grads
    from refimpl.weights.parameters import Params, ParamSpec
    from refimpl.weights.support import Support

SCORES = ".scores"
"""What the name of a tensor's scores adds to the tensor's."""


class Movement(Hidden):
    """Movement pruning; see the module.

    To the trained arrays ``name`` of the tensors that are pruned it adds ``name.scores``, of their shape.

    Parameters
    ----------
    allocation : Allocation
        How dense each tensor is in the end. In the soft form, which learns that, a density below 1 says only that
        the tensor is pruned.
    begin_step, end_step : int
        Hard form: the steps after which the density begins to fall, and has fallen. Soft form: M is first made after
        ``begin_step``.
    interval : int
        Training steps between renewals of M.
    form : {"hard", "soft"}
        Whether a count or a threshold decides.
    threshold : float
        τ of the soft form, in [0, 1).
    penalty : float
        λ of the soft form.
    scores_lr : float
        Factor of the learning rate for the scores: η_S / η.
    conventions : Conventions
        Of which the allocation's are read.

    Raises
    ------
    ValueError
        If an option is outside its range, or the hard form is given a penalty.
    """

    name = "movement"

    def __init__(
        self,
        allocation: Allocation,
        *,
        begin_step: int,
        end_step: int,
        interval: int = 1,
        form: Literal["hard", "soft"] = "hard",
        threshold: float = 0.1,
        penalty: float = 0.0,
        scores_lr: float = 1.0,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(conventions)
        if not 0 <= begin_step <= end_step:
            raise ValueError(
                f"movement pruning is to run from step {begin_step} to step {end_step}; give 0 <= begin_step <= "
                "end_step"
            )
        if interval < 1:
            raise ValueError(f"the interval between renewals of the mask is {interval} steps; give at least 1")
        if form not in ("hard", "soft"):
            raise ValueError(f"the form of movement pruning is {form!r}; give 'hard' or 'soft'")
        if not 0 <= threshold < 1:
            raise ValueError(f"the threshold of movement pruning is {threshold}; give a number from 0 to below 1")
        for option, value in (("penalty", penalty), ("scores_lr", scores_lr)):
            if not 0 <= value < np.inf:
                raise ValueError(f"the {option} of movement pruning is {value}; give a finite number of at least 0")
        if form == "hard" and penalty:
            raise ValueError(
                f"the penalty of movement pruning is {penalty:g}, but the hard form has none; give 0, or form 'soft'"
            )
        self.allocation = allocation
        self.begin_step = begin_step
        self.end_step = end_step
        self.interval = interval
        self.form = form
        self.threshold = threshold
        self.penalty = penalty
        self.scores_lr = scores_lr
        self.density: dict[str, float] = {}

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember the densities in the end; return no support, for everything stays stored."""
        allocated = densities(specs, self.allocation, self.conventions)
        self.density = {name: density for name, density in allocated.items() if density < 1}
        for name, density in self.density.items():
            count_at(density, specs[name].size, self.conventions, name)  # raises if none would be left
        self.forget()
        return {}

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Return the parameters as drawn, and scores of 0."""
        scores: Params = {name + SCORES: np.zeros_like(self.dense(name, params[name])) for name in self.density}
        return params | scores

    def view(self, params: Params) -> Params:
        """Return W on A."""
        scores = {name + SCORES for name in self.density}
        return {name: weight for name, weight in super().view(params).items() if name not in scores}

    def update_support(self, name: str, params: Params) -> Support | None:
        """Return A for a weight; scores move everywhere."""
        used = self.chosen(params).get(name)
        return used[0].support if used else None

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Return G on A for the weights, and G ⊙ W with the penalty's gradient for the scores."""
        pulled, used = {}, self.chosen(params)
        for name in params:
            if name not in grads:
                continue  # scores come with their weights
            gradient = evaluate(grads[name], params[name])
            pulled[name] = gradient.reshape(-1)[used[name][0].flat] if name in used else gradient
            if name in self.density:
                weight = self.dense(name, params[name])
                pulled[name + SCORES] = gradient * weight + self._penalty_gradient(name, params)
        return pulled

    def _penalty_gradient(self, name: str, params: Params) -> np.ndarray | float:
        if not self.penalty:
            return 0.0
        scores = values_of(params[name + SCORES])
        number = sum(values_of(params[other]).size for other in self.density)
        return (self.penalty / number) * sigmoid(scores) * sigmoid(-scores)

    def lr_scale(self, name: str) -> float:
        """Return the factor of the scores."""
        return self.scores_lr if any(name == weight + SCORES for weight in self.density) else 1.0

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether M is to be renewed after this step: from ``begin_step`` on, for the scores move to the end."""
        from_begin = step - self.begin_step
        return not epoch_end and from_begin >= 0 and (from_begin % self.interval == 0 or step == self.end_step)

    def choose(self, params: Params, step: int) -> dict[str, tuple[np.ndarray, ...]]:
        """Return A by the scores, for the tensors of which some weights are unused; all are used at first."""
        used: dict[str, tuple[np.ndarray, ...]] = {}
        for name in self.density if step else ():
            scores = values_of(params[name + SCORES]).reshape(-1)
            flat = keep_largest(scores, self._count(name, scores, step))
            if flat.size < scores.size:
                used[name] = (flat,)
        return used

    def _count(self, name: str, scores: np.ndarray, step: int) -> int:
        """Return K(t); of the soft form the number above the threshold, which are the largest, for σ rises."""
        if self.form == "soft":
            return max(int(0.005 * scores.size) + 1, int(np.count_nonzero(sigmoid(scores) > self.threshold)))
        density = cubic(1.0, self.density[name], step=step, begin=self.begin_step, end=self.end_step)
        return count_at(density, scores.size, self.conventions, name)

    def settled(self, step: int) -> bool:
        """Tell whether the schedule has come to its end."""
        return step >= self.end_step

    def state_dict(self) -> dict[str, Any]:
        """Return the densities, and the shapes of the tensors of which some weights are unused."""
        return super().state_dict() | {"density": dict(self.density)}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the densities and A."""
        super().load_state_dict(state, arrays)
        self.density = {name: float(density) for name, density in state["density"].items()}
