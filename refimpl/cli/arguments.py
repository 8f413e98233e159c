"""The commands, their options and their help."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from refimpl import __version__

DATASETS = ("ptb", "wikitext-2", "mnist", "fashion-mnist", "cifar-10", "cifar-100")
FORMATS = ("torch", "scipy", "npz")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all errors of the command line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"refimpl: error: {message}; see: {self.prog} --help\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples as they were written."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``module`` and ``function`` of its result say what to call."""
    parser = Parser(
        prog="refimpl",
        formatter_class=_Help,
        description="Sparse training of neural networks without a deep-learning framework: only the weights\n"
        "that exist are stored, computed with and trained.",
        epilog="The first command to try, about a minute on two cores:  refimpl train\n"
        "Each command explains itself:  refimpl COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"refimpl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (
        *(_train, _finetune, _recipes, _methods, _compare, _conventions, _flops, _evaluate, _sample, _plot),
        *(_fetch, _info, _export, _import),
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, to: str, summary: str, more: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, formatter_class=_Help, description=f"{summary}.\n\n{more}", epilog=f"examples:\n{example}"
    )
    module, function = to.split(":")
    parser.set_defaults(module=module, function=function)
    return parser


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", metavar="N", help="threads of the kernels; 0 takes all processors; the numbers do not depend on it"
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", help="folder with the text: train.txt, valid.txt, test.txt, or the files of "
        "Penn Treebank or WikiText; 'default' is the English text that Python carries; of a classifier, folder with "
        "the images: the files of MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100"
    )  # fmt: skip


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", nargs="+", default=[], dest="settings",
        help="replace settings of the recipe, such as sparsity=0.9 or optimizer.lr=10",
    )  # fmt: skip


def _train(commands: Any) -> None:
    parser = _command(
        commands, "train", "train:train",
        "train a model by a recipe, or go on with a run",
        "Reads the recipe and the data, checks everything, and then makes the run's folder: config.json,\n"
        "metrics.jsonl and checkpoints. Ends with a report: perplexity or accuracy, sparsity of each weight,\n"
        "density of each gate, operations as a fraction of dense, and the time of a sparse and a dense step.\n\n"
        "Ctrl-C saves and stops at the end of the step. A run that was stopped, or killed at any moment, goes on\n"
        "with --resume and comes to the same bits as one that never stopped. Kernels are compiled the first time\n"
        "they are met and kept on disk.",
        "  refimpl train\n"
        "  refimpl train selfish-lstm --set sparsity=0.9 epochs=5 --seed 7 --out runs/nine-tenths\n"
        "  refimpl train ptb-lstm-small-rigl --data data/ptb\n"
        "  refimpl train mlp-fashion-mnist-set --data data/fashion-mnist\n"
        "  refimpl train --resume runs/nine-tenths",
    )  # fmt: skip
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE",
        help="a name from `refimpl recipes`, or a .toml file of your own (default: selfish-lstm)",
    )  # fmt: skip
    _data(parser)
    _settings(parser)
    parser.add_argument("--seed", metavar="N", help="seed of every random draw")
    _threads(parser)
    parser.add_argument("--dtype", metavar="TYPE", help="float32 or float64")
    parser.add_argument("--out", metavar="RUN", help="new folder of the run (default: runs/RECIPE-1, -2, ...)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")


def _finetune(commands: Any) -> None:
    parser = _command(
        commands, "finetune", "train:fine_tune", "train the dense twin of a run's sparse model on, as a run of its own",
        "A run of a method with dense phases (acdc) leaves two models: the sparse one, and the best dense one that an\n"
        "epoch of a dense phase ended with. From the whole state of that, training goes on densely, to the end of the\n"
        "same learning-rate schedule. Ctrl-C and refimpl train --resume work as for every run.",
        "  refimpl finetune runs/acdc-fashion-mnist-1\n"
        "  refimpl finetune runs/acdc-fashion-mnist-1 --out runs/dense-twin",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of the run that has the dense twin; only read")
    _data(parser)
    _threads(parser)
    parser.add_argument("--out", metavar="NEW", help="new folder of the run (default: RUN-finetuned-1, -2, ...)")


def _recipes(commands: Any) -> None:
    _command(
        commands, "recipes", "listing:recipes", "list the recipes that come with the package",
        "A recipe is a TOML file with the settings of one experiment; one's own may extend one of these:\n"
        '  extends = "selfish-lstm"\n  [method]\n  sparsity = 0.95',
        "  refimpl recipes",
    )  # fmt: skip


def _conventions(commands: Any) -> None:
    parser = _command(
        commands, "conventions", "conventions:conventions", "print the choices that papers leave open, by system",
        "Knobs down, profiles across. A profile is what another system does, exactly, its defects included; the\n"
        "default is marked.",
        "  refimpl conventions\n"
        "  refimpl conventions --profile rigl-tf\n"
        "  refimpl train ptb-lstm-small-rigl --set method.conventions=selfish-authors",
    )  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help="one profile, with what each of its choices means")


def _methods(commands: Any) -> None:
    _command(
        commands, "methods", "listing:methods", "list the methods of sparse training",
        "Each name is a value of the setting `method`; each has a small recipe, lstm-NAME.",
        "  refimpl methods\n  refimpl train --set method=rigl sparsity=0.9",
    )  # fmt: skip


def _compare(commands: Any) -> None:
    parser = _command(
        commands, "compare", "compare:run_all", "train several methods on one model, and print what they come to",
        "Model, data, optimizer, budget and sparsity are the recipe's, the same for all; a method's own options are\n"
        "those of its small recipe (lstm-NAME). Each run has a folder in --out, so that a comparison that was stopped\n"
        "goes on, and one with more methods or seeds only trains those that are new. Columns: validation loss and\n"
        "test score of the best checkpoint, its exact sparsity; operations of training (executed, and by the\n"
        "method's published formula) and of inference as fractions of dense; median time of a step, and mean with\n"
        "exchanges; fraction of the sparse weights' entries that were ever used.",
        "  refimpl compare selfish-lstm --set sparsity=0.9 epochs=2 --out runs/lstm\n"
        "  refimpl compare mlp-fashion-mnist-dense --data data/fashion-mnist --methods set,rigl,gmp --seeds 1,2 "
        "--out runs/mlp",
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="what to train; its method does not count")
    parser.add_argument("--methods", metavar="NAMES", default="all", help="names with commas between (default: all)")
    parser.add_argument("--seeds", metavar="NUMBERS", default="", help="with commas between (default: the recipe's)")
    _data(parser)
    _settings(parser)
    _threads(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the runs")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--plot", metavar="FILE", help="draw score against operations: png, pdf or svg")


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands, "eval", "evaluate:evaluate",
        "print validation and test perplexity, or accuracy, of a run's best checkpoint",
        "The data must be those that the run was trained on, byte for byte (its sha256 is compared). A run of acdc\n"
        "leaves the dense twin of its sparse model too, which is evaluated besides.",
        "  refimpl eval runs/selfish-lstm-1\n  refimpl eval runs/ptb-lstm-small-rigl-1 --data /corpora/ptb\n"
        "  refimpl eval runs/acdc-fashion-mnist-1 --json",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    _data(parser)
    _threads(parser)
    parser.add_argument("--dense", action="store_true", help="the dense twin alone")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _sample(commands: Any) -> None:
    parser = _command(
        commands, "sample", "evaluate:sample", "print text that a run's best model makes up",
        "Words are drawn one after the other from the model's probabilities, with the temperature T from\n"
        "p^(1/T) normalised: below 1 more predictable, above 1 more adventurous, 0 always the likeliest word.\n"
        "The end of a sentence, <eos>, is printed as a line break.",
        '  refimpl sample runs/selfish-lstm-1\n'
        '  refimpl sample runs/selfish-lstm-1 --words 30 --temperature 0.7 --prompt "return the"',
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--words", metavar="N", type=int, default=100, help="how many words to draw (default: 100)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0 or more (default: 1)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed, another text (default: 0)")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="words to begin with, separated by spaces")


def _plot(commands: Any) -> None:
    parser = _command(
        commands, "plot", "plot:plot", "draw loss, perplexity or accuracy, gate densities and update counts of runs",
        "Several runs come into one figure. Needs matplotlib: pip install 'refimpl[plot]'. The file's ending\n"
        "chooses the format: png, pdf, svg.",
        "  refimpl plot runs/selfish-lstm-1\n"
        "  refimpl plot runs/ptb-selfish runs/ptb-static runs/ptb-dense --out comparison.pdf",
    )  # fmt: skip
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", help="the figure (default: RUN/figure.png of the first run)")


def _fetch(commands: Any) -> None:
    parser = _command(
        commands, "fetch", "listing:fetch", "download a data set, checked against its published sha256",
        f"Data sets: {', '.join(DATASETS)}. A file with a wrong checksum is not kept,\n"
        "and one that is already there with the right one is not downloaded again. The licences are\n"
        "the data sets' own.",
        "  refimpl fetch ptb                      into data/ptb, where the recipes look for it\n"
        "  refimpl fetch wikitext-2 --out /corpora/wikitext-2",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--out", metavar="DIR", help="folder of the files (default: data/NAME)")
    parser.add_argument("--mirror", metavar="URL", help="take the files from URL/FILE, with the same checksums")


def _flops(commands: Any) -> None:
    parser = _command(
        commands, "flops", "flops:flops", "count the floating-point operations of a recipe's run, without training",
        "Operations of inference and of training: as this program would execute them, and as the literature counts\n"
        "them, with what lies between the two by name. Of the data only sizes are needed.",
        "  refimpl flops ptb-lstm-small-rigl --set sparsity=0.9 --data data/ptb\n"
        "  refimpl flops ptb-lstm-rigl --vocabulary 10000 --tokens 929589 --json",
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="as of refimpl train (default: selfish-lstm)")
    _data(parser)
    _settings(parser)
    parser.add_argument("--vocabulary", metavar="N", type=int, help="words of a text that is not at hand")
    parser.add_argument("--tokens", metavar="N", type=int, help="length of its training part (default: 1,000,000)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _info(commands: Any) -> None:
    _command(
        commands, "info", "info:info", "print versions, processors, threads, BLAS, kernels, cache and extras",
        "What to put into a report of a problem.", "  refimpl info",
    )  # fmt: skip


def _export(commands: Any) -> None:
    parser = _command(
        commands, "export", "files:export", "write a run's best model for other programs",
        "torch  FILE.pt from torch.save: {'state_dict': dense tensors under PyTorch's names, 'masks': ...};\n"
        "       module.load_state_dict(torch.load(FILE)['state_dict']). Needs pip install 'refimpl[crosscheck]'\n"
        "scipy  a folder: one scipy.sparse.save_npz file for each sparse weight, the others in dense.npz\n"
        "npz    FILE.npz: one dense array for each name, and masks/NAME for sparse weights\n"
        "All three hold the supports, zeros that are stored included: refimpl import gives the same bits back.",
        "  refimpl export runs/selfish-lstm-1 --to torch\n"
        "  refimpl export runs/selfish-lstm-1 --to scipy --out weights/",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--to", metavar="FORMAT", choices=FORMATS, required=True, help="torch, scipy or npz")
    parser.add_argument("--dense", action="store_true", help="the dense twin of a run of acdc, not the sparse model")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/model.pt, RUN/model-scipy or RUN/model.npz")


def _import(commands: Any) -> None:
    parser = _command(
        commands, "import", "files:import_", "take up a model that was exported, or a state dict from elsewhere",
        "--out FILE.npz writes the weights as a checkpoint of this package. --out RUN makes a new run from\n"
        "them, at step 0: eval, sample and export work on it, and train --resume trains on from these weights.\n"
        "The run's configuration is the one in the file; for files from elsewhere give --recipe. Without masks a\n"
        "weight that has zeros becomes sparse, without those zeros.",
        "  refimpl import model.pt --out runs/imported\n"
        "  refimpl import theirs.pt --recipe ptb-lstm-selfish --data data/ptb --out runs/theirs\n"
        "  refimpl import weights/ --out weights.npz",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="a .pt or .npz file, or a folder of scipy files")
    parser.add_argument("--out", metavar="RUN", required=True, help="new folder of a run, or a file ending in .npz")
    parser.add_argument("--recipe", metavar="RECIPE", help="configuration of the new run")
    _data(parser)
    _settings(parser)
