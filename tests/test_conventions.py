"""The knobs themselves: accepted, explained, printed, and refused where a sparse run cannot follow."""

import importlib.util
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from refimpl.cli import main
from refimpl.cli.conventions import explanations
from refimpl.methods import Conventions, profile
from refimpl.methods.conventions import (
    DEFAULT,
    ONE_STEP_ONLY,
    TOPICS,
    choices,
    for_training,
    kept_after,
    require_sparse,
    stored_again,
    stored_at,
)
from refimpl.methods.profiles import ABOUT, PROFILES, STEPS

ASKED_FOR = {
    "rigl-tf", "jaxpruner", "itop", "cerebras", "sparsimony", "rigl-torch", "torch-prune", "sparse-learning",
    "set-original", "selfish-authors", "sparseml",
}  # fmt: skip


def test_every_knob_belongs_to_one_topic_and_is_explained():
    names = [field.name for topic in TOPICS for field in fields(topic)]
    assert sorted(names) == sorted({field.name for field in fields(Conventions)})
    for topic in TOPICS:
        for name, said in explanations(topic).items():
            assert len(said) > 30, name
            for choice in choices()[name]:
                assert isinstance(choice, bool) or f'"{choice}"' in (topic.__doc__ or ""), (name, choice)


@pytest.mark.parametrize("name", sorted({field.name for field in fields(Conventions)} - {"grown_value"}))
def test_every_choice_is_accepted_and_no_other(name):
    for choice in choices()[name]:
        assert getattr(Conventions(**{name: choice}), name) == choice
    for wrong in ("nonsense", 7, None):
        with pytest.raises(ValueError, match=rf"the convention {name} is .*; give one of "):
            Conventions(**{name: wrong})


def test_profiles_are_there_and_described():
    assert set(PROFILES) == set(ABOUT) == ASKED_FOR | {"default"}
    for about in ABOUT.values():
        assert about.system
        assert set(about.steps) <= set(STEPS)
    assert profile("default") == DEFAULT
    assert len(set(PROFILES.values())) == len(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_a_run_refuses_what_it_cannot_follow(name):
    conventions = profile(name)
    beyond = {knob for knob, refused in ONE_STEP_ONLY.items() if getattr(conventions, knob) in refused}
    assert (not beyond) == (name in ("default", "selfish-authors", "set-original"))
    if beyond:
        with pytest.raises(ValueError, match="cannot train with the conventions") as report:
            require_sparse(conventions)
        for knob in beyond:
            assert f"{knob}={getattr(conventions, knob)!r}" in str(report.value)
            assert f"{knob}={getattr(DEFAULT, knob)!r}" in str(report.value)
    followed = for_training(conventions)
    require_sparse(followed)
    changed = {f.name for f in fields(Conventions) if getattr(followed, f.name) != getattr(conventions, f.name)}
    assert changed == beyond


def test_what_runs_refuse_are_choices_and_never_defaults():
    for knob, refused in ONE_STEP_ONLY.items():
        assert set(refused) < set(choices()[knob])
        assert getattr(DEFAULT, knob) not in refused


def test_counts():
    assert [stored_at(10, s, DEFAULT) for s in (0, 0.5, 0.75, 0.85, 1)] == [10, 5, 2, 2, 0]  # 1 - 0.85 is above 0.15
    assert stored_at(1000, 0.9, replace(DEFAULT, initial_rounding="floor")) == 99
    assert stored_at(1000, 0.9, replace(DEFAULT, initial_rounding="floor", initial_of="zeros")) == 100
    assert stored_at(10, 1, replace(DEFAULT, kept_minimum="one")) == 1
    assert stored_again(7, 10, profile("jaxpruner")) == 7
    assert kept_after(10, 0.25, DEFAULT) == 8
    assert kept_after(10, 1, DEFAULT) == 0
    assert kept_after(10, 1, DEFAULT, minimum=1) == 1
    for rule, given in (("kept-of-density", "size"), ("kept-of-target", "sparsity")):
        with pytest.raises(ValueError, match=f"give {given}"):
            kept_after(10, 0.5, replace(DEFAULT, drop_of=rule))
    with pytest.raises(ValueError, match="give a drop fraction from 0 to 1"):
        kept_after(10, 1.5, DEFAULT)


# --- the command ----------------------------------------


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_table(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["conventions"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    for name in PROFILES:
        assert name in out
    for field in fields(Conventions):
        assert any(line.startswith(field.name) for line in out.splitlines())
    assert "matrix*, gate, layer" in out


@pytest.mark.parametrize("name", PROFILES)
def test_one_profile(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["conventions", "--profile", name]) == 0
    out = capsys.readouterr().out
    for field in fields(Conventions):
        assert f"\n{field.name} = " in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("(default: ") == sum(
        getattr(PROFILES[name], f.name) != getattr(DEFAULT, f.name) for f in fields(Conventions)
    )


def test_an_unknown_profile(capsys):
    assert main(["conventions", "--profile", "rigltf"]) == 2
    assert "did you mean 'rigl-tf'" in capsys.readouterr().err


# --- the divergence table ----------------------------------------


def divergence():
    path = Path(__file__).parents[1] / "tools" / "divergence.py"
    spec = importlib.util.spec_from_file_location("divergence", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(capsys, *arguments):
    assert divergence().main([*arguments, "--json"]) == 0
    return {row["profile"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    # A dataclass looks its module up by name while it is made.
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "divergence", ModuleType("divergence"))


def test_six_programs_give_three_masks(capsys):
    found = rows(capsys, "--shape", "32x48", "--sparsity", "0.9", "--drop-fraction", "0.3")
    assert [found[name]["hamming"] for name in ("default", "rigl-tf", "rigl-torch", "jaxpruner")] == [0, 0, 0, 0]
    assert [found[name]["kept"] for name in ("itop", "cerebras", "sparsimony")] == [107] * 3
    assert [found[name]["nnz"] for name in ("itop", "cerebras", "sparsimony")] == [154, 154, 153]
    assert found["itop"]["hamming"] == found["cerebras"]["hamming"] == 2
    assert [name for name, row in found.items() if row["nnz"] is None] == ["torch-prune", "set-original"]


def test_two_programs_return_to_one_entry_fewer(capsys):
    found = rows(capsys, "--shape", "100x100", "--sparsity", "0.8")
    assert {name for name, row in found.items() if row["nnz"] == 1999} == {"cerebras", "sparsimony"}
    assert {row["nnz"] for row in found.values()} == {1999, 2000, None}


def test_ties_make_a_threshold_replace_more(capsys):
    found = rows(capsys, "--tied", "--seed", "3")
    assert found["itop"]["grown"] > found["default"]["grown"] == 46
    for row in found.values():
        if row["fates"]:
            assert sum(row["fates"].values()) == 32 * 48


def test_the_table_on_the_screen(capsys):
    assert divergence().main([]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + len(PROFILES)
    assert any(line.split() == ["torch-prune", "n/a", "n/a", "n/a", "n/a"] for line in out)
    with pytest.raises(SystemExit):
        divergence().main(["--shape", "3y4"])
