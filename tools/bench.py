"""Benchmarks: what sparse training costs beside dense training, and beside other sparse libraries.

    python tools/bench.py lstm --threads 1,2 --sparsity 0.67,0.9 --json lstm.json --plot lstm.png
    python tools/bench.py products --models 1500x1500 --batch 20,128
    python tools/bench.py scale --models 3000,30000,300000

  lstm      training step of stacked LSTMs, layers x units
  ptb       training step of the whole language model: embedding, LSTMs, decoder
  mlp       training step of multilayer perceptrons, sizes of the layers
  conv      3x3 convolution, channels-heightxwidth, and training step of resnet20-w64
  products  the products of one linear layer, outputs x inputs
  topology  a RigL and a SET update beside a training step
  scale     very wide perceptrons with SET, neurons in a hidden layer: time and memory
  latency   import and first step
  memory    what a training step of an LSTM layer holds

A step is forward, backward, weight gradients on the support, clipping (lstm, ptb) and optimizer. Each table is measured
in a process of its own, in which the candidates take turns; medians and ratios are printed. Where torch is installed,
tables of training steps come twice: with the C library's allocator as installed, and tuned (torch-dense-tuned).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import bench_children
import bench_peers
from bench_task import Allocator, Record, Task, save_records

FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark takes, and how it is divided into tables."""

    module: str
    models: tuple[str, ...] = ("",)
    form: str = ""
    batches: tuple[int, ...] = (0,)
    sparsity: tuple[float, ...] = (0.5, 0.67, 0.8, 0.9, 0.95, 0.98)
    seconds: float = 10.0
    peers: tuple[str, ...] = ()
    allocators: bool = False
    ratios: bool = False


LSTMS, NETWORKS = ("2x1500", "2x650", "2x200"), ("3072-4000-1000-4000-10", "784-300-100-10")
CONVOLUTIONS = ("64-32x32", "128-16x16", "256-8x8", "512-4x4", "16-32x32", "resnet20-w64")
BENCHMARKS = {
    "lstm": Benchmark("bench_lstm", LSTMS, r"\d+x\d+", peers=("torch",), allocators=True, ratios=True),
    "ptb": Benchmark("bench_ptb", LSTMS[:2], r"\d+x\d+", peers=("torch",), allocators=True, ratios=True),
    "mlp": Benchmark("bench_mlp", NETWORKS, r"\d+(-\d+)+", peers=("torch",), allocators=True, ratios=True),
    "conv": Benchmark(
        "bench_conv", CONVOLUTIONS, r"\d+-\d+x\d+|resnet\d+-w\d+", sparsity=(0.67, 0.8, 0.9, 0.95, 0.98),
        peers=("torch",), allocators=True, ratios=True,
    ),
    "products": Benchmark(
        "bench_products", ("1500x1500", "6000x1500", "4096x4096"), r"\d+x\d+", (20, 32, 128, 700),
        (0.5, 0.67, 0.8, 0.9, 0.95, 0.98, 0.99), peers=("torch", "sparse_dot_mkl", "sparseprop"), ratios=True,
    ),
    "topology": Benchmark("bench_elsewhere", sparsity=(0.67, 0.9, 0.98)),
    "scale": Benchmark("bench_scale", ("3000", "30000"), r"\d+", (2, 128), sparsity=()),
    "latency": Benchmark("bench_elsewhere", sparsity=(0.9,)),
    "memory": Benchmark("bench_memory", ("1x1500",), r"1x\d+", sparsity=(0.5, 0.67, 0.9, 0.95, 0.98)),
}  # fmt: skip


def comma(kind: str, convert: Callable[[str], Any], accepted: Callable[[Any], bool]) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated values, which says what it accepts."""

    def parse(text: str) -> list[Any]:
        try:
            values = [convert(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(accepted(value) for value in values):
            raise argparse.ArgumentTypeError(f"got {text!r}; give {kind}, separated by commas")
        return values

    return parse


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number above 0")
    return value


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"bench.py: {message}\n")


def parser() -> Parser:
    """Return the parser of the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    out = Parser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    out.add_argument("benchmark", choices=list(BENCHMARKS), metavar="BENCHMARK", help="one of the above")
    whole = comma("whole numbers from 1 on", int, lambda n: n >= 1)
    fraction = comma("numbers from 0 to just below 1", float, lambda s: 0 <= s < 1)
    out.add_argument("--threads", type=whole, metavar="N,...", help="numbers of threads, a table each (default: 1,2)")
    out.add_argument("--sparsity", type=fraction, metavar="S,...", help="shares of the weights that are not there")
    out.add_argument("--models", metavar="M,...", help="such as 2x1500,2x650; see above")
    out.add_argument("--batch", type=whole, metavar="B,...", help="columns, a table each (default: the usual ones)")
    out.add_argument(
        "--seconds", type=positive, metavar="S", help="about how long each table is measured (default: 10)"
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write a list with one record a measurement")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the ratios over the density (lstm, ptb, mlp, conv, products)"
    )
    return out


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def complaint(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, before anything is measured."""
    benchmark = BENCHMARKS[args.benchmark]
    if args.threads and max(args.threads) > processors():
        return f"--threads {max(args.threads)}: this process may use {processors()} processors; give no more threads"
    if args.models is not None:
        if not benchmark.form:
            return f"--models: the benchmark {args.benchmark} has no models to choose from; leave it out"
        for model in args.models.split(","):
            if not re.fullmatch(benchmark.form, model) or re.search(r"(?<!\d)0", model):
                usual = ", ".join(benchmark.models)
                return f"--models {model!r}: the benchmark {args.benchmark} takes models such as {usual}"
    if args.batch is not None and benchmark.module == "bench_elsewhere":
        return f"--batch: the benchmark {args.benchmark} has a batch of its own; leave it out"
    if args.sparsity is not None and not benchmark.sparsity:
        return f"--sparsity: in the benchmark {args.benchmark} it follows from the sizes; leave it out"
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            return f"{option} {path}: there is no folder {path.parent}; make it first"
        if path is not None and path.is_dir():
            return f"{option} {path}: this is a folder; give the name of a file"
    if args.plot is not None:
        if not benchmark.ratios:
            return f"--plot: the benchmark {args.benchmark} has no ratios to draw; leave it out"
        if args.plot.suffix.lower() not in FORMATS:
            return f"--plot {args.plot}: give a name that ends in {', '.join(FORMATS)}"
        if importlib.util.find_spec("matplotlib") is None:
            return "--plot: this needs matplotlib, which is not installed (pip install 'refimpl[plot]')"
    own = Path(__file__).with_name(f"bench_{args.benchmark}.py")
    if benchmark.module == "bench_elsewhere" and not own.is_file():
        return f"the benchmark {args.benchmark} needs {own.name}, which is not beside this program"
    return None


def tasks(args: argparse.Namespace, peers: tuple[str, ...]) -> list[Task]:
    """Divide a benchmark into tables."""
    benchmark = BENCHMARKS[args.benchmark]
    allocators: tuple[Allocator, ...] = ("default",)
    if benchmark.allocators and "torch" in peers and sys.platform == "linux":
        allocators = ("default", "tuned")
    return [
        Task(
            args.benchmark, benchmark.module, model, batch, count, allocator,
            tuple(args.sparsity or benchmark.sparsity), args.seconds or benchmark.seconds, peers,
        )
        for model in (args.models.split(",") if args.models else benchmark.models)
        for batch in args.batch or benchmark.batches
        for count in args.threads or [n for n in (1, 2) if n <= processors()]
        for allocator in allocators
    ]  # fmt: skip


def found_peers(benchmark: Benchmark) -> tuple[str, ...]:
    """Return the peers that there are, and name those that are left out."""
    there, missing = bench_peers.find(benchmark.peers, bench_children.environment(1))
    for name, reason in missing.items():
        print(f"left out: {name} {reason}", file=sys.stderr)
    return tuple(there)


def tell_blas() -> None:
    """Say so if the environment asks for slower BLAS kernels than these tables use."""
    fastest, asked = bench_children.fastest_blas(), os.environ.get("OPENBLAS_CORETYPE")
    if fastest and asked and asked != fastest:
        print(
            f"OPENBLAS_CORETYPE is {asked!r}; the tables use {fastest}, the fastest kernels for this machine",
            file=sys.stderr,
        )


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark that the command line names."""
    args = (command := parser()).parse_args(words)
    wrong = complaint(args)
    if wrong:
        command.error(wrong)
    tell_blas()
    records: list[Record] = []
    try:
        for task in tasks(args, found_peers(BENCHMARKS[args.benchmark])):
            records += bench_children.run(task)
            if args.json:  # after each table, so that nothing measured is lost
                save_records(args.json, records)
    except bench_children.ChildError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if args.plot:
        import bench_plot

        from refimpl import plots

        plots.save(bench_plot.draw(records), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
