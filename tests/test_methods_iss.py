"""ISS: groups, penalty and its gradient, units that leave, and the smaller model; and planted mistakes."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iss_cases import LM, NET, dense, drawn, kill, places

from refimpl.methods import iss as iss_module
from refimpl.methods.iss import ISS, SMOOTHING, UnitGroups, dead_units, norms, unit_groups
from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.optim import SGD
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.weights import ParamSpec, SparseWeight, support_of, values_of

EPS = np.finfo(float).eps
CONV = {
    "a.weight": ParamSpec("a.weight", (3, 2, 2, 2), "conv", True, layer="a"),
    "b.weight": ParamSpec("b.weight", (4, 3, 2, 2), "conv", True, layer="b", source="a"),
    "c.weight": ParamSpec("c.weight", (2, 8), "linear", True, layer="c", source="b"),
}


def method_of(model, **options):
    method = ISS(**options)
    method.supports(model.specs(), seed=0)
    return method


# --- the groups and the penalty ------------------------------


def check_norms(model, corner="once", sparse=False, seed=0):
    params = drawn(model, seed, sparse)
    groups = unit_groups(model.specs())
    for (layer, unit), members in places(model).items():
        members = members if corner == "twice" else set(members)
        expected = sum(float(dense(params[name])[i, j]) ** 2 for name, i, j in members)
        found = norms(params, groups[layer], corner)[unit]
        # at most 100 terms, all positive but for the corner, which is added twice and taken away once
        assert abs(found - expected) <= 200 * EPS * (expected + 1), f"unit {unit} of {layer}"
    assert {layer for layer, _ in places(model)} == set(groups)


@pytest.mark.parametrize("model", [LM, NET, replace(LM, layers=1), LanguageModel(5, 2, 1, layers=2), MLP((1, 1, 1))])
@pytest.mark.parametrize("corner", ["once", "twice"])
@pytest.mark.parametrize("sparse", [False, True])
def test_norms_are_those_of_the_groups_written_out(model, corner, sparse):
    check_norms(model, corner, sparse)


def test_a_tied_embedding_reads_the_last_layer():
    groups = unit_groups(LanguageModel(7, 4, 4, layers=2, tied=True).specs())
    assert "encoder.weight" not in groups["rnn.0"].columns
    assert groups["rnn.1"].columns == {"rnn.weight_hh_l1": 1, "encoder.weight": 1}


def test_channels_of_a_convolution_are_units():
    groups = unit_groups(CONV)
    assert groups["a"] == UnitGroups("a", 3, ("a.weight",), {"b.weight": 4})
    assert groups["b"] == UnitGroups("b", 4, ("b.weight",), {"c.weight": 2})
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(spec.shape) for name, spec in CONV.items()}
    expected = (params["a.weight"] ** 2).sum((1, 2, 3)) + (params["b.weight"] ** 2).sum((0, 2, 3))
    assert np.allclose(norms(params, groups["a"]), expected, rtol=50 * EPS, atol=0)
    expected = (params["b.weight"] ** 2).sum((1, 2, 3)) + (params["c.weight"].reshape(2, 4, 2) ** 2).sum((0, 2))
    assert np.allclose(norms(params, groups["b"]), expected, rtol=50 * EPS, atol=0)


def check_gradient(kind=ISS, **options):
    """Compare the penalty's gradient with torch's of the groups written out."""
    torch = pytest.importorskip("torch")
    for model in (LM, NET):
        params = drawn(model, 1)
        method = kind(penalty=0.3, **options)
        method.supports(model.specs(), seed=0)
        leaves = {name: torch.tensor(w, requires_grad=True) for name, w in params.items()}
        total = 0
        for members in places(model).values():
            members = members if options.get("corner") == "twice" else sorted(set(members))
            total = total + torch.sqrt(sum(leaves[name][i, j] ** 2 for name, i, j in members) + SMOOTHING)
        (0.3 * total).backward()
        zero = {name: np.zeros(w.shape) for name, w in params.items()}
        pulled = method.pull(params, zero)
        assert abs(method.loss(params) - 0.3 * float(total.detach())) <= 1000 * EPS
        for name, leaf in leaves.items():
            expected = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
            assert np.abs(pulled[name] - expected).max() <= 200 * EPS, name


@pytest.mark.parametrize("corner", ["once", "twice"])
def test_the_gradient_of_the_penalty_is_torchs(corner):
    check_gradient(corner=corner)


def test_the_gradient_on_sparse_weights_is_that_of_their_pictures():
    params = drawn(LM, 2, sparse=True)
    method = method_of(LM, penalty=0.3)
    pictures = {name: dense(w) for name, w in params.items()}
    expected = method.penalty_gradient(pictures)
    for name, gradient in method.penalty_gradient(params).items():
        there = expected[name].reshape(-1)[support_of(params[name]).flat]
        assert np.abs(gradient - there).max() <= 100 * EPS


def test_a_unit_of_zeros_has_no_gradient_and_no_trouble():
    params = {name: np.zeros(spec.shape) for name, spec in LM.specs().items()}
    method = method_of(LM)
    for gradient in method.pull(params, params).values():
        assert (gradient == 0).all()
    assert method.loss(params) == pytest.approx(7e-5 * 8 * 1e-4)


def test_the_type_of_the_weights_is_kept():
    params = {name: w.astype(np.float32) for name, w in drawn(LM, 0).items()}
    method = method_of(LM)
    pulled = method.pull(params, {name: np.zeros_like(w) for name, w in params.items()})
    assert {gradient.dtype for gradient in pulled.values()} == {np.dtype(np.float32)}


# --- units that die ------------------------------------------


subsets = st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=6).filter(
    lambda units: all(sum(layer == k for layer, _ in units) < 4 for k in (0, 1))
)


def check_dead(units, sparse, seed):
    params = drawn(LM, seed, sparse)
    dead = {(f"rnn.{k}", unit) for k, unit in units}
    kill(params, LM, dead)
    pictures = {name: dense(w) for name, w in params.items()}
    by_definition = {key for key, members in places(LM).items() if all(pictures[n][i, j] == 0 for n, i, j in members)}
    assert dead <= by_definition
    found = {(layer, int(unit)) for layer, those in dead_units(params, LM.specs()).items() for unit in those}
    assert found == by_definition
    exchanges = method_of(LM).exchange(params, step=1, seed=0)
    stays = {name: support_of(weight).mask() for name, weight in params.items()}
    for key in by_definition:
        for name, i, j in places(LM)[key]:
            stays[name][i, j] = False
    for name, weight in params.items():
        if name in exchanges:
            assert np.array_equal(exchanges[name].new.mask(), stays[name])
            assert exchanges[name].goes.any()
        else:
            assert np.array_equal(support_of(weight).mask(), stays[name])


@settings(max_examples=20, deadline=None)
@given(subsets, st.booleans(), st.integers(0, 1000))
def test_dead_units_leave_and_all_others_stay(units, sparse, seed):
    check_dead(units, sparse, seed)


def test_a_single_weight_keeps_a_unit():
    for place in places(LM)["rnn.0", 2]:
        params = drawn(LM, 3)
        kill(params, LM, [("rnn.0", 2)])
        params[place[0]][place[1], place[2]] = 1e-300
        assert dead_units(params, LM.specs())["rnn.0"].size == 0


def test_the_threshold_zeroes_what_lies_in_groups_and_nothing_else():
    params = drawn(LM, 4)
    params["rnn.weight_hh_l0"].flat[:3] = [0.0999, -0.0999, 0.1]
    params["encoder.weight"].flat[0] = params["rnn.bias_hh_l0"][0] = 0.01
    expected = {
        name: np.where(np.abs(w) < 0.1, 0, w) if w.ndim == 2 and name != "encoder.weight" else w.copy()
        for name, w in params.items()
    }
    method_of(LM, threshold=0.1).adjust(params, step=1, lr=0.1, seed=0)
    assert all(np.array_equal(params[name], expected[name]) for name in params)
    assert params["rnn.weight_hh_l0"].flat[2] == 0.1


def test_whole_runs():
    check_run(lambda d, steps, epoch: ISS(penalty=0.3 * (d < 1), threshold=0.05 * (d < 1)), "pruning")


def test_units_of_no_use_leave_for_good_and_the_rest_learns(monkeypatch):
    real, useless, alive = QuadraticModel.target, [1, 3], [0, 2]

    def target(self, name):
        """Two units have nothing to learn: their groups' targets are almost zero."""
        wanted = real(self, name).copy()
        if self.specs()[name].layer == "rnn.0":
            wanted.reshape(4, 4, 4)[:, useless] *= 1e-3
        if self.specs()[name].source == "rnn.0":
            wanted[:, useless] *= 1e-3
        return wanted

    monkeypatch.setattr(QuadraticModel, "target", target)
    trainer = trainer_of(ISS(penalty=1.0, threshold=0.03), optimizer=SGD())
    model, sizes = QuadraticModel(), []
    before = model.loss(trainer.state.params)
    train(trainer, 120, lambda t: sizes.append(values_of(t.state.params["rnn.weight_hh_l0"]).size))
    params = trainer.state.params
    assert model.loss(params) < before / 2
    assert dead_units(params, model.specs())["rnn.0"].tolist() == useless
    assert all(a >= b for a, b in pairwise(sizes))
    stays = np.zeros((4, 4, 4), bool)
    stays[:, np.array(alive)[:, None], alive] = True
    assert np.array_equal(params["rnn.weight_hh_l0"].support.mask(), stays.reshape(16, 4))
    assert params["rnn.weight_ih_l0"].support.mask().reshape(4, 4, 4)[:, alive].all()
    assert params["rnn.weight_ih_l0"].nnz == 4 * 2 * 4
    assert np.array_equal(params["fc.weight"].support.mask().all(0), [True, False, True, False])
    assert params["fc.weight"].nnz == 20
    assert not isinstance(params["encoder.weight"], SparseWeight)


def test_a_layer_may_not_die_as_a_whole():
    params = drawn(LM, 5)
    kill(params, LM, [("rnn.1", unit) for unit in range(4)])
    with pytest.raises(ValueError, match=r"all 4 units of rnn\.1"):
        method_of(LM).exchange(params, step=1, seed=0)


def test_the_state_holds_the_groups():
    method = method_of(LM)
    other = ISS()
    other.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert other.groups == method.groups
    assert [method.exchange_due(step=3, epoch_end=end) for end in (False, True)] == [False, True]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ISS(penalty=-1.0), "penalty"),
        (lambda: ISS(threshold=float("nan")), "threshold"),
        (lambda: ISS(corner="never"), "corner"),
        (lambda: method_of(MLP((3, 2))), "hidden layer"),
        (lambda: unit_groups(CONV | {"c.weight": replace(CONV["c.weight"], shape=(2, 7))}), "number of its units"),
        (
            lambda: unit_groups({"w": ParamSpec("w", (8, 2), "recurrent", True, layer="rnn.0", source="rnn.0")}),
            "nothing is said to read",
        ),
        (
            lambda: unit_groups(
                LM.specs()
                | {
                    "rnn.weight_hh_l0": replace(
                        LM.specs()["rnn.weight_hh_l0"], blocks={"i": slice(0, 6), "f": slice(6, 16)}
                    )
                }
            ),
            "number of its units",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- planted mistakes ----------------------------------------


def plant(monkeypatch, change):
    """Change the groups that everything is built on."""
    real = iss_module.unit_groups
    monkeypatch.setattr(iss_module, "unit_groups", lambda specs: {k: change(g, specs) for k, g in real(specs).items()})
    monkeypatch.setattr(f"{__name__}.unit_groups", iss_module.unit_groups)


def without_readers(groups, specs):
    own = {name: n for name, n in groups.columns.items() if specs[name].layer == groups.layer}
    return replace(groups, columns=own)


def without_own_column(groups, specs):
    return replace(groups, columns={name: n for name, n in groups.columns.items() if name not in groups.rows})


def without_input_rows(groups, specs):
    return replace(groups, rows=groups.rows[1:])


@pytest.mark.parametrize("change", [without_readers, without_own_column, without_input_rows])
def test_missing_parts_of_groups_are_caught(change, monkeypatch):
    plant(monkeypatch, change)
    with pytest.raises((AssertionError, KeyError)):
        check_norms(LM)
    with pytest.raises(AssertionError):
        check_gradient()
    with pytest.raises(AssertionError):
        check_dead({(0, 2), (1, 1)}, False, 0)


class Unsmoothed(ISS):
    def penalty_gradient(self, params):
        return {name: np.sign(g) * self.penalty for name, g in super().penalty_gradient(params).items()}


class OtherCorner(ISS):
    def supports(self, specs, *, seed):
        self.corner = "twice"
        return super().supports(specs, seed=seed)


def test_other_mistakes_are_caught(monkeypatch):
    for mutant in (Unsmoothed, OtherCorner):
        with pytest.raises(AssertionError):
            check_gradient(mutant)
    real = iss_module._Entries.of
    interleaved = lambda weight: replace(real(weight), row=real(weight).row // 4)  # noqa: E731
    monkeypatch.setattr(iss_module._Entries, "of", interleaved)
    with pytest.raises(AssertionError):
        check_norms(LM)
