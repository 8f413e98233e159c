"""The configuration of a run, the recipes that come with the package, and single settings on top of them.

A recipe is a TOML file: a ``description``, optionally ``extends`` (the recipe whose settings it starts from,
so that the baselines of one experiment are a few lines each), then the fields of `Config`, one table for each
section.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from refimpl.training.checks import Interval, accepts_text, checked, nearest, shown
from refimpl.training.method_section import STARTS_DENSE, Method
from refimpl.training.model_section import MODELS, Model
from refimpl.training.sections import Data, Optimizer, Section, Training, annotations_of

SECTIONS: dict[str, type[Section]] = {cls.table: cls for cls in (Data, Model, Method, Optimizer, Training)}
FREE_TO_CHANGE = frozenset({"data.corpus", "training.checkpoint_every", "training.keep", "training.threads"})
"""Settings that a resumed run may change: its numbers stay the same (a corpus is known by its sha256)."""


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes.

    Attributes
    ----------
    task : {"language-model", "classification"}
        What is learnt: the next word of a text, or the class of an image. The model must be one for it.
    seed : int
        Seed of every draw, from 0 to 2**64 − 1.
    dtype : {"float32", "float64"}
        Type of all trained numbers.
    data, model, method, optimizer, training
        The tables; see their classes.

    Raises
    ------
    ValueError
        If a value has the wrong type, is out of range, or contradicts another; always one sentence with the
        key, what was given and what is accepted.
    """

    SCALARS: ClassVar[tuple[str, ...]] = ("task", "seed", "dtype")
    task: Literal["language-model", "classification"] = "language-model"
    seed: Annotated[int, Interval(0, 2**64, "[)")] = 1111
    dtype: Literal["float32", "float64"] = "float32"
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        hints = annotations_of(type(self))
        for name in self.SCALARS:
            object.__setattr__(self, name, checked(name, hints[name], getattr(self, name)))
        for name, cls in SECTIONS.items():
            table = getattr(self, name)
            if not isinstance(table, cls):
                raise ValueError(f"{name} is {shown(table)}; give a {cls.__name__}, or use Config.from_dict")
        if self.model.name not in MODELS[self.task]:
            own = next(task for task, models in MODELS.items() if self.model.name in models)
            raise ValueError(
                f"task is {self.task!r} and model.name is {self.model.name!r}; give task={own} for that model, or for "
                f"that task model={' or '.join(MODELS[self.task])}"
            )
        if self.optimizer.name == "nt-asgd" and self.optimizer.leak and self.method.name in STARTS_DENSE:
            raise ValueError(
                f"optimizer.leak is true and method {self.method.name!r} takes weights away from dense arrays, whose "
                "averages have nothing to leak into before that; set leak to false"
            )
        if self.data.augment and self.task != "classification":
            raise ValueError(f"data.augment is true and task is {self.task!r}; set it to false, it is for images")
        if self.training.label_smoothing and self.task != "classification":
            raise ValueError(
                f"training.label_smoothing is {self.training.label_smoothing} and task is {self.task!r}; set it to 0, "
                "it is for images"
            )

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Config:
        """Build a configuration from nested dictionaries; what is left out has its default.

        Raises
        ------
        ValueError
            As the class does, and for an unknown key, naming the nearest known one.
        """
        given: dict[str, Any] = {}
        for name, value in tables.items():
            if name in cls.SCALARS:
                given[name] = value
            elif name not in SECTIONS:
                raise _unknown(name, [*cls.SCALARS, *SECTIONS])
            elif not isinstance(value, Mapping):
                raise ValueError(f"{name} is {shown(value)}; give a table, which TOML writes [{name}]")
            else:
                for key in value:
                    if key not in annotations_of(SECTIONS[name]):
                        raise _unknown(f"{name}.{key}", _keys())
                given[name] = SECTIONS[name](**value)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of values that JSON and TOML have; `from_dict` is the way back."""
        tables: dict[str, Any] = {name: getattr(self, name) for name in self.SCALARS}
        for name in SECTIONS:
            section = getattr(self, name)
            tables[name] = {f.name: _plain(getattr(section, f.name)) for f in fields(section)}
        return tables

    def to_flat(self) -> dict[str, Any]:
        """Return one dictionary from ``"section.key"`` to plain values, each convention a key of its own."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(entry, dict):
                    flat |= {f"{name}.{key}.{choice}": v for choice, v in entry.items()}
                else:
                    flat[f"{name}.{key}" if key else name] = entry
        return flat


def differences(first: Config, second: Config, ignore: Iterable[str] = FREE_TO_CHANGE) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configurations differ, each with both values (``None``: not set)."""
    a, b = first.to_flat(), second.to_flat()
    skipped = set(ignore)
    keys = [key for key in {**a, **b} if key not in skipped]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def override(config: Config, settings: Iterable[str]) -> Config:
    """Return a configuration with single settings replaced.

    Parameters
    ----------
    config : Config
        Where to start; unchanged.
    settings : iterable of str
        Each ``"key=value"``. The key is ``section.key``, a bare ``key`` that only one section has, the name
        of a section for its ``name`` (``"method=rigl"``), ``method.convention.choice`` or
        ``method.density.PARAMETER``. The value is read as TOML (``20``, ``true``, ``[0.9, 0.98]``), and as plain
        text where it is not TOML or the option is a text. The last of two settings of one key holds; contradictions
        are looked for when all are in place.

    Raises
    ------
    ValueError
        For a setting without ``=``, an unknown key (with the nearest known one), an ambiguous one, a wrong
        type or an impossible value.
    """
    tables = config.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{shown(setting)} is not a setting; give key=value, such as sparsity=0.9")
        *path, last = _resolve(key.strip())
        table = tables
        for name in path:
            table = table[name]
        annotation = _keys().get(".".join([*path, last]), None)
        table[last] = _value(text.strip(), annotation)
    return Config.from_dict(tables)


def recipes() -> list[tuple[str, str]]:
    """Return the name and the one-line description of every recipe in the package, by name."""
    found = (entry for entry in resources.files("refimpl.recipes").iterdir() if entry.name.endswith(".toml"))
    return sorted(
        (entry.name.removesuffix(".toml"), tomllib.loads(entry.read_text("utf-8")).get("description", ""))
        for entry in found
    )


def load_recipe(name_or_path: str | Path) -> Config:
    """Read a recipe of the package by its name, or one's own from a ``.toml`` file.

    A recipe that says ``extends = "other"`` starts from that recipe (a name, or a file beside it) and
    replaces single keys of its tables; chains are followed.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If there is no recipe of that name, the file is not TOML in UTF-8, recipes extend each other in a
        circle, or a setting is refused (see `Config`).
    """
    return Config.from_dict(_tables(str(name_or_path), Path(), ()))


def _tables(recipe: str, beside: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    if recipe.endswith(".toml"):
        path = beside / recipe
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no recipe file {str(path)!r}; give a .toml file that exists, or a recipe's name"
            )
        identity, data = str(path.resolve()), path.read_bytes()
    else:
        names = [name for name, _ in recipes()]
        if recipe not in names:
            raise ValueError(
                f"there is no recipe {recipe!r}; the nearest is {nearest(recipe, names)!r}, `refimpl "
                f"recipes` lists all, and a file's name must end in .toml"
            )
        path = Path()
        identity, data = recipe, resources.files("refimpl.recipes").joinpath(f"{recipe}.toml").read_bytes()
    if identity in seen:
        circle = " -> ".join([*seen, identity])
        raise ValueError(f"recipe {recipe!r} extends itself through {circle}; break the circle")
    try:
        tables = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {recipe!r} is not TOML in UTF-8: {error}; correct that place") from None
    parent, description = tables.pop("extends", None), tables.pop("description", "")
    for key, value in (("extends", "" if parent is None else parent), ("description", description)):
        if not isinstance(value, str):
            raise ValueError(f"recipe {recipe!r} has {key} = {shown(value)}; give a text")
    base = {} if parent is None else _tables(parent, path.parent, (*seen, identity))
    merged = _merge(base, tables)
    try:
        Config.from_dict(merged)
    except ValueError as error:
        raise ValueError(f"recipe {recipe!r}: {error}") from None
    return merged


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _keys() -> dict[str, Any]:
    scalars = annotations_of(Config)
    known = {name: scalars[name] for name in Config.SCALARS}
    for name, cls in SECTIONS.items():
        known |= {f"{name}.{key}": annotation for key, annotation in annotations_of(cls).items()}
    return known


def _resolve(key: str) -> list[str]:
    known = _keys()
    if key.startswith("method.convention.") and key.count(".") == 2:
        return key.split(".")
    if key.startswith("method.density."):
        return key.split(".", 2)  # a parameter's name has dots of its own
    if f"{key}.name" in known:
        return [key, "name"]
    if key in known:
        return key.split(".")
    full = [name for name in known if name.endswith(f".{key}")]
    if len(full) > 1:
        raise ValueError(f"{key!r} is a key of several tables; give one of {', '.join(full)}")
    if not full:
        raise _unknown(key, known)
    return full[0].split(".")


def _unknown(key: str, known: Iterable[str]) -> ValueError:
    names = {name: name for name in known}
    if "." not in key:
        names |= {name.split(".")[-1]: name for name in names}
        names |= {name.removesuffix(".name"): name for name in names.values() if name.endswith(".name")}
    return ValueError(f"there is no setting {key!r}; the nearest is {names[nearest(key, names)]!r}")


def _value(text: str, annotation: Any) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        parsed = {}
    if set(parsed) != {"value"} or (accepts_text(annotation) and not isinstance(parsed["value"], str)):
        try:
            return text if accepts_text(annotation) else float(text)  # such as .25, which TOML does not know
        except ValueError:
            return text
    return parsed["value"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value
