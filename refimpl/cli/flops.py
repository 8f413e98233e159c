"""``refimpl flops``: the operations of a run, counted without training."""

from __future__ import annotations

import argparse
import json
from typing import Any

from refimpl.analysis.flops_by_phase import of_forecast
from refimpl.cli.train import DEFAULT_RECIPE, configure
from refimpl.training import flop_account
from refimpl.training.config import Config, load_recipe
from refimpl.training.countings import Counting, countings_of
from refimpl.training.flops import TERMS, forward, total
from refimpl.training.published import DIFFERENCES, FORMULAS
from refimpl.training.simulate import Forecast, planned_run

STATUS = {
    "verified": "verified in the authors' counting code",
    "remembered": "as the paper is remembered; unchecked",
    "derived": "derived by the same rules",
}
EPOCHS_SHOWN = 12


def flops(arguments: argparse.Namespace) -> int:
    """Print what a run would execute, and what the literature would count."""
    recipe = arguments.recipe if arguments.recipe is not None else DEFAULT_RECIPE
    config = configure(load_recipe(recipe), arguments)
    if arguments.tokens is not None and arguments.vocabulary is None:
        raise ValueError("--tokens is given without --vocabulary; give both, or --data DIR alone")
    try:
        found = planned_run(config, vocabulary=arguments.vocabulary, tokens=arguments.tokens)
    except FileNotFoundError as error:
        if config.task != "language-model":
            raise
        raise FileNotFoundError(f"{error}; without the text, --vocabulary N says how many words it has") from None
    if arguments.json:
        print(json.dumps(as_json(recipe, config, found), indent=2))
    else:
        print("\n".join(as_text(recipe, config, found)))
    return 0


def as_json(recipe: str, config: Config, found: Forecast) -> dict[str, Any]:
    """Return all that is known as nested dictionaries."""
    account = found.total
    return {
        "recipe": recipe,
        "method": config.method.name,
        "inference": {"dense": found.dense, "sparse": found.sparse, "fraction": found.sparse / found.dense},
        "training": {
            **flop_account.fractions(account, found.specs),
            "formula": {"name": found.formula.name, "text": found.formula.text, "status": found.formula.status},
        },
        "countings": {counting.whose: counted(counting, found) for counting in countings(config, found)},
        "account": account,
        "epochs": [total(epoch["executed"]) for epoch in found.epochs],
        "phases": [
            {**vars(phase), "fraction": phase.fraction} for phase in (of_forecast(found).phases if found.phases else ())
        ],
        "tensors": {name: tensor(found, name) for name in found.specs},
        "notes": found.notes,
    }


def countings(config: Config, found: Forecast) -> list[Counting]:
    """Return the other ways in which the network was counted."""
    return countings_of(config.model.name, found.specs, found.others)


def counted(counting: Counting, found: Forecast) -> dict[str, Any]:
    """Return what inference on a sample and training take by another way to count."""
    dense, sparse = counting.dense, counting.forward(found.last.used)
    training = counting.training(found.formula, found.visits)
    samples = found.total["samples"]["published"]
    return {
        "dense": dense,
        "sparse": sparse,
        "fraction": sparse / dense,
        "training": training,
        "training_operations": training * 3 * dense * samples,
        "besides": counting.besides,
    }


def tensor(found: Forecast, name: str) -> dict[str, Any]:
    """Return shape and sizes of one weight, at the start and at the end."""
    spec = found.specs[name]
    return {
        "shape": list(spec.shape),
        "size": spec.size,
        "columns_per_sample": spec.columns_per_sample,
        "forward": {"first": found.first.used[name], "last": found.last.used[name]},
        "gradient": {"first": found.first.graded[name], "last": found.last.graded[name]},
        "operations": forward(found.specs, {name: found.last.used[name]}),
    }


def as_text(recipe: str, config: Config, found: Forecast) -> list[str]:
    """Return the lines that people read."""
    account, unit = found.total, "token" if config.task == "language-model" else "image"
    fractions = flop_account.fractions(account, found.specs)
    sparsity = "" if config.method.name == "dense" else f", sparsity {config.method.sparsity:g}"
    epochs = f"{len(found.epochs)} epoch{'s' if len(found.epochs) > 1 else ''}"
    formula = f"{found.formula.text}; {STATUS[found.formula.status]}"
    lines = [
        f"{recipe}: method {config.method.name}{sparsity}; {epochs}, {account['samples']['executed']:,.0f} {unit}s",
        "biases, nonlinearities and the optimizer are not counted; a multiplication and an addition are two",
        f"{_weights(found)}",
        "",
        f"inference, operations for each {unit}: f_D = {found.dense:,.0f}, f_S = {found.sparse:,.0f} "
        f"(fraction {found.sparse / found.dense:.4f})",
        "training, as a fraction of dense training:",
        f"  executed   {fractions['executed']:.4f}",
        f"  published  {fractions['published']:.4f}   {formula}",
        *_other_form(found),
        *_by_epoch(found),
        *_countings(config, found),
        *_by_phase(found),
        "",
        *_terms("executed in the whole run", account["executed"], TERMS),
        *_terms("published for the whole run", account["published"], TERMS | EXCHANGE_BATCH),
        *_terms("executed less published", account["differences"], DIFFERENCES),
        "",
        *_tensors(found),
    ]
    return [*lines, *(f"note: {note}" for note in found.notes)]


EXCHANGE_BATCH = {
    "weight_gradient": "gradients of the weights",
    "exchange_batch": "a batch more for each exchange, with a dense gradient",
}


def _other_form(found: Forecast) -> list[str]:
    """GMP is published in two ways; the other one takes the weight gradient to be sparse."""
    if found.formula.name != "gmp":
        return []
    other, samples = FORMULAS["gmp-sparse-gradient"], found.total["samples"]["published"]
    fraction = found.total["published"]["forward"] / (samples * found.dense)  # 3 f_S(t) over 3 f_D
    return [f"             {fraction:.4f}   {other.text}; {STATUS[other.status]}"]


def _weights(found: Forecast) -> str:
    prunable = [spec.size for spec in found.specs.values() if spec.prunable]
    every = sum(spec.size for spec in found.specs.values())
    return (
        f"{every:,} weights in {len(found.specs)} tensors, of which {sum(prunable):,} in {len(prunable)} are prunable"
    )


def _by_epoch(found: Forecast) -> list[str]:
    shares = [flop_account.fractions(epoch, found.specs)["executed"] for epoch in found.epochs]
    if len(shares) < 2 or max(shares) - min(shares) < 5e-4:
        return []
    shown = shares if len(shares) <= EPOCHS_SHOWN else [*shares[: EPOCHS_SHOWN - 1], shares[-1]]
    texts = [f"{share:.3f}" for share in shown]
    if len(shown) < len(shares):
        texts.insert(-1, "...")
    return [f"  by epoch   {' '.join(texts)}"]


def _countings(config: Config, found: Forecast) -> list[str]:
    """What the authors' programs make of it, who count normalisation, rectifiers and the like too."""
    known = countings(config, found)
    lines = ["", "counted with what is not a product, as in authors' programs:"] if known else []
    for counting in known:
        their = counted(counting, found)
        lines.append(
            f"  {counting.whose:<15}  f_D = {their['dense']:,.0f}, f_S = {their['sparse']:,.0f} "
            f"(fraction {their['fraction']:.4f}); training {their['training']:.4f}, "
            f"{their['training_operations']:.4g}"
        )
    return lines


def _by_phase(found: Forecast) -> list[str]:
    if not found.phases:
        return []
    table = of_forecast(found)
    lines = ["", f"{'phase':<10}  {'epochs':>9}  {'executed':>10}  {'of dense':>8}  {'of the run':>10}"]
    for phase in table.phases:
        epochs = f"{phase.start}-{phase.stop - 1}" if phase.stop - phase.start > 1 else f"{phase.start}"
        share = phase.executed / table.executed
        lines.append(f"{phase.kind:<10}  {epochs:>9}  {phase.executed:>10.4g}  {phase.fraction:>8.4f}  {share:>10.1%}")
    epochs = f"0-{table.phases[-1].stop - 1}"
    return [*lines, f"{'all':<10}  {epochs:>9}  {table.executed:>10.4g}  {table.fraction:>8.4f}  {1:>10.1%}"]


def _terms(title: str, terms: dict[str, float], meanings: dict[str, str]) -> list[str]:
    whole = total(terms)
    lines = [f"{title}: {whole:.4g}"]
    for name in meanings:
        if name in terms:
            lines.append(f"  {name:<16} {terms[name]:>11.4g}   {meanings[name]}")
    return lines


def _tensors(found: Forecast) -> list[str]:
    width = max(map(len, found.specs))
    moved = found.first != found.last
    head = f"{'weight':<{width}}  {'shape':>14}  {'A':>11}  {'density':>7}  {'B':>11}"
    lines = [head + (f"  {'A at first':>11}" if moved else "") + f"  {'of f_S':>7}"]
    for name, spec in found.specs.items():
        used, graded = found.last.used[name], found.last.graded[name]
        share = forward(found.specs, {name: used}) / found.sparse
        shape = " x ".join(map(str, spec.shape))
        line = f"{name:<{width}}  {shape:>14}  {used:>11,}  {used / spec.size:>7.4f}  {graded:>11,}"
        lines.append(line + (f"  {found.first.used[name]:>11,}" if moved else "") + f"  {share:>7.1%}")
    return lines
