"""The configuration: recipes, single settings, and a sentence for every value that is refused."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.training import method_section, model_section, sections
from refimpl.training.checks import Interval, checked
from refimpl.training.config import SECTIONS, Config, differences, load_recipe, override, recipes

NAMES = [name for name, _ in recipes()]


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and 20 < len(text) < 500 and not text.endswith(".")


def options() -> dict[str, Any]:
    tables = {name: sections.annotations_of(cls) for name, cls in SECTIONS.items()}
    return {f"{name}.{key}": kind for name, table in tables.items() for key, kind in table.items()}


def contradicts(error: ValueError) -> bool:
    """Whether a refusal is one of those that compare two options."""
    words = (
        "no such option", "model.name", "augment", "tied", "nesterov", "floor", "backward_sparsity",
        "lr_min", "_fraction", "pattern", "interval", "initial_", "method.density", "compress", "optimizer.leak",
        "warmup_epochs", "milestones", "strides", "label_smoothing", "model.depth",
    )  # fmt: skip
    return one_sentence(error) and any(word in str(error) for word in words)


@st.composite
def values_of(draw: st.DrawFn, annotation: Any) -> Any:
    """Draw a value that the annotation allows, written independently of the check."""
    extras = getattr(annotation, "__metadata__", ())
    base = annotation.__origin__ if extras else annotation
    interval = extras[0] if extras else Interval(0)
    if get_origin(base) is Literal:
        return draw(st.sampled_from(get_args(base)))
    if get_origin(base) in (UnionType, Union):
        return draw(st.sampled_from(get_args(base)).flatmap(values_of))
    if get_origin(base) is tuple and get_args(base)[-1] is ...:
        return tuple(draw(st.lists(values_of(get_args(base)[0]), min_size=1, max_size=3)))
    if get_origin(base) is tuple:
        return tuple(draw(values_of(a)) for a in get_args(base))
    if get_origin(base) is Mapping:
        choices = st.sampled_from(["exact", True, 3, 0.5])
        return draw(st.dictionaries(st.sampled_from(["growth", "regrow"]), choices))
    if base is bool:
        return draw(st.booleans())
    if base is str:
        return draw(st.text(min_size=1, max_size=8))
    low, high = interval.low, min(interval.high, 1e6)
    if base is int:
        return draw(st.integers(int(low), int(high)))
    open_low, open_high = interval.ends[0] == "(", interval.ends[1] == ")" and interval.high == high
    return draw(st.floats(low, high, exclude_min=open_low, exclude_max=open_high))


@given(st.data())
def test_a_configuration_survives_json_and_toml_forms(data: st.DataObject) -> None:
    tables: dict[str, Any] = {}
    for key, annotation in options().items():
        section, name = key.split(".")
        if data.draw(st.booleans()):
            tables.setdefault(section, {})[name] = data.draw(values_of(annotation))
    try:
        config = Config.from_dict(tables)
    except ValueError as error:
        if not contradicts(error):
            raise
        return
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert not differences(config, config)
    for section, entries in tables.items():
        for name, value in entries.items():
            assert getattr(getattr(config, section), name) == value


@given(st.data())
def test_override_sets_what_it_says_and_nothing_else(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(options())))
    value = data.draw(values_of(options()[key]))
    if isinstance(value, dict) or (isinstance(value, str) and value != value.strip()):
        return
    config = Config()
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    if isinstance(value, str) and "\x7f" in value:  # JSON leaves DEL as it is, TOML wants it escaped
        return
    try:
        changed = override(config, [f"{key}={text}"])
    except ValueError as error:
        if not contradicts(error):
            raise
        return
    assert set(differences(config, changed, ignore=())) <= {key}
    section, name = key.split(".")
    assert getattr(getattr(changed, section), name) == value


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads(name: str) -> None:
    config = load_recipe(name)
    assert Config.from_dict(config.to_dict()) == config


def test_recipes_have_one_line_descriptions() -> None:
    for _, description in recipes():
        assert description
        assert "\n" not in description
        assert len(description) <= 110
    assert "selfish-lstm" in NAMES


def test_the_papers_settings() -> None:
    config = load_recipe("ptb-lstm-selfish")
    model, method, optimizer = config.model, config.method, config.optimizer
    assert (model.embedding_size, model.hidden_size, model.layers, model.tied) == (1500, 1500, 2, False)
    assert (model.dropout_input, model.dropout_hidden, model.dropout_output) == (0.65,) * 3
    assert (method.sparsity, method.allocation, method.drop_fraction) == (0.67, "uniform", 0.8)
    assert (optimizer.name, optimizer.lr, optimizer.clip, optimizer.nonmono) == ("snt-asgd", 40.0, 0.25, 5)
    assert (optimizer.weight_decay, config.seed) == (1.2e-6, 1111)
    assert (config.training.epochs, config.training.batch_size, config.training.bptt) == (100, 20, 35)


@pytest.mark.parametrize("size", ["", "small-"])
@pytest.mark.parametrize("baseline", ["dense", "static", "set", "rigl", "topkast"])
def test_a_baseline_differs_from_its_experiment_in_the_method_only(size: str, baseline: str) -> None:
    other = load_recipe(f"ptb-lstm-{size}{baseline}")
    assert other.method.name == baseline
    changed = differences(load_recipe(f"ptb-lstm-{size}selfish"), other, ignore=())
    assert all(key.startswith("method.") or key == "optimizer.name" for key in changed)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("method=rigl", "method.name", "rigl"),
        ("optimizer=adam", "optimizer.name", "adam"),
        ("lr=.001", "optimizer.lr", 0.001),
        ("lr = 3", "optimizer.lr", 3.0),
        ("betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("tied=true", "model.tied", True),
        ("corpus=2024", "data.corpus", "2024"),
        ("corpus=a=b", "data.corpus", "a=b"),
        ("data.corpus='my text'", "data.corpus", "my text"),
        ("dtype=float64", "dtype", "float64"),
        (f"seed={2**64 - 1}", "seed", 2**64 - 1),
        ("method.convention.growth=exact", "method.convention", {"growth": "exact"}),
        ("method.convention.first=2", "method.convention", {"first": 2}),
        ("method.density.encoder.weight=0.5", "method.density", {"encoder.weight": 0.5}),
    ],
)
def test_override(setting: str, key: str, value: Any) -> None:
    before = Config()
    found: Any = override(before, [setting])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    assert before == Config()


def test_the_last_setting_holds_and_contradictions_are_looked_for_at_the_end() -> None:
    config = override(Config(), ["tied=true", "hidden_size=64", "lr=1", "embedding_size=64", "lr=2"])
    assert config.model.tied
    assert config.optimizer.lr == 2


BAD = {
    "sparsity=1": ["method.sparsity", "1", "[0, 1)"],
    "sparsity=-0.1": ["method.sparsity", "-0.1", "[0, 1)"],
    "sparsity=nan": ["method.sparsity", "nan", "[0, 1)"],
    "sparsity=inf": ["method.sparsity", "inf", "[0, 1)"],
    "sparsity=high": ["method.sparsity", "'high'", "a number"],
    "sparsity=true": ["method.sparsity", "true", "a number"],
    "batch_size=0": ["training.batch_size", "0", "integer of at least 1"],
    "batch_size=true": ["training.batch_size", "true", "integer"],
    "batch_size=2.0": ["training.batch_size", "2.0", "integer"],
    "epochs=-3": ["training.epochs", "-3", "at least 1"],
    "bptt=[35]": ["training.bptt", "[35]", "integer"],
    "tied=1": ["model.tied", "1", "true or false"],
    "tied=True": ["model.tied", "'True'", "true or false"],
    "tied=true": ["model.tied", "embedding_size", "hidden_size"],
    "dropout_input=1": ["model.dropout_input", "[0, 1)"],
    "lr=0": ["optimizer.lr", "above 0"],
    "clip=inf": ["optimizer.clip", "inf", "at least 0"],
    "clip=nan": ["optimizer.clip", "nan", "at least 0"],
    "lr=" + "9" * 400: ["optimizer.lr", "above 0"],
    "batch_size=" + "9" * 5000: ["training.batch_size", "integer"],
    "betas=[0.9]": ["optimizer.betas", "2"],
    "betas=[0.9, 1]": ["optimizer.betas[1]", "[0, 1)"],
    "nesterov=true": ["optimizer.nesterov", "momentum"],
    "method=rgl": ["method.name", "'rgl'", "nearest is 'rigl'"],
    "method=topkast": ["backward_sparsity", "method.sparsity"],
    "dtype=float16": ["dtype", "'float32' or 'float64'"],
    "seed=-1": ["seed", "-1"],
    f"seed={2**64}": ["seed", str(2**64)],
    "corpus=": ["data.corpus", "default"],
    "sparsty=0.5": ["'sparsty'", "nearest is 'method.sparsity'"],
    "method.sparity=0.5": ["'method.sparity'", "nearest is 'method.sparsity'"],
    "optimzer=adam": ["'optimzer'", "nearest is 'optimizer.name'"],
    "training.lr=1": ["'training.lr'", "nearest is"],
    "name=lstm": ["model.name", "method.name", "optimizer.name"],
    "method.convention=x": ["method.convention", "table"],
    "method.convention.growth=[1]": ["method.convention", "table"],
    "method.density.encoder.weight=1.5": ["method.density.encoder.weight", "at most 1"],
    "method.density.encoder.weight=true": ["method.density.encoder.weight", "above 0"],
    "method.density.encoder.weight=nan": ["method.density.encoder.weight", "nan"],
    "lr": ["'lr'", "key=value"],
    "layers=2\nlayers=3": ["model.layers", "integer"],
    "=3": ["''"],
}


@pytest.mark.parametrize("setting", BAD, ids=[key[:30] for key in BAD])
def test_bad_settings_are_answered_in_one_sentence(setting: str) -> None:
    start = override(Config(), ["hidden_size=100", "sparsity=0.4"])
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        override(start, [setting])
    assert one_sentence(caught.value)
    for word in BAD[setting]:
        assert word in str(caught.value)


def test_averages_cannot_leak_into_weights_that_are_dense_at_first() -> None:
    leaking = ["optimizer=nt-asgd", "leak=true"]
    override(Config(), [*leaking, "method=set"])
    with pytest.raises(ValueError, match=r"optimizer\.leak is true and method 'gmp' .*; set leak to false$"):
        override(Config(), [*leaking, "method=gmp"])


def test_bad_values_from_python() -> None:
    wrong: list[Any] = [1, -0.1, float("nan"), None, "0.5", np.array([0.5])]
    for sparsity in wrong:
        with pytest.raises(ValueError, match=r"method\.sparsity"):
            method_section.Method(sparsity=sparsity)
    with pytest.raises(ValueError, match=r"^method is "):
        Config(method="rigl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model is 3; give a table"):
        Config.from_dict({"model": 3})
    with pytest.raises(ValueError, match="nearest is 'model'"):
        Config.from_dict({"modl": {}})
    with pytest.raises(ValueError, match=r"nearest is 'model\.layers'"):
        Config.from_dict({"model": {"layer": 3}})


def test_numpy_scalars_and_missing_corpus_are_understood() -> None:
    size: Any = np.int32(8)
    sparsity: Any = np.float32(0.5)
    assert type(model_section.Model(hidden_size=size).hidden_size) is int
    assert type(method_section.Method(sparsity=sparsity).sparsity) is float
    assert sections.Data(corpus=None).corpus == "default"  # type: ignore[arg-type]


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]
    choices = {"growth": "exact"}
    method = method_section.Method(convention=choices)
    choices["growth"] = "bernoulli"
    assert method.convention == {"growth": "exact"}


@given(st.floats(allow_nan=True), st.sampled_from(["[]", "[)", "()", "(]"]))
def test_intervals(value: float, ends: Any) -> None:
    inside = value in Interval(0, 1, ends)
    if inside:
        assert 0 <= value <= 1
        assert value > 0 or ends[0] == "["
        assert value < 1 or ends[1] == "]"
        assert checked("key", float, value) == value
    elif 0 <= value <= 1:
        assert (value == 0 and ends[0] == "(") or (value == 1 and ends[1] == ")")


def test_differences_name_keys_and_both_values() -> None:
    first = Config()
    second = override(first, ["sparsity=0.9", "threads=2", "method.convention.growth=exact"])
    assert differences(first, second) == {
        "method.sparsity": (0.8, 0.9),
        "method.convention.growth": (None, "exact"),
    }
    assert "training.threads" in differences(first, second, ignore=())


def test_recipe_files(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "selfish-lstm"\n[method]\nsparsity = 0.5\n')
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n[optimizer]\nlr = 3\n')
    child = load_recipe(tmp_path / "child.toml")
    assert set(differences(load_recipe("selfish-lstm"), child)) == {"method.sparsity", "optimizer.lr"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[method]\nsparsity = 1\n", r"method\.sparsity is 1; give a number in \[0, 1\)"),
        (b"[method]\nsparsty = 0.5\n", r"nearest is 'method\.sparsity'"),
        (b"[method\n", "not TOML"),
        (b"a = '\xff'\n", "UTF-8"),
        (b"extends = 'selfsh-lstm'\n", "nearest is 'selfish-lstm'"),
        (b"extends = 'x.toml'\n", r"extends itself through .*x\.toml -> .*x\.toml"),
        (b"extends = 3\n", "extends = 3; give a text"),
        (b"description = 3\n", "description = 3; give a text"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "x.toml").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(tmp_path / "x.toml")
    assert one_sentence(caught.value)


def test_missing_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the nearest is 'selfish-lstm'"):
        load_recipe("selfish-lstn")
    with pytest.raises(FileNotFoundError, match="recipe"):
        load_recipe(tmp_path / "none.toml")


def test_packaged_recipes_are_plain_toml_with_known_parents() -> None:
    for name in NAMES:
        text = resources.files("refimpl.recipes").joinpath(f"{name}.toml").read_text("utf-8")
        tables = tomllib.loads(text)
        assert tables.get("extends", NAMES[0]) in NAMES
