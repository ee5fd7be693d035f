"""``deal bench`` as typer knows it; what is measured loads inside."""

from __future__ import annotations

from typing import Annotated

import typer

from deal_core.errors import choose
from simulations.output.console import wide_console

bench = typer.Typer(help="Measure parts of deal on this machine.", no_args_is_help=True)

OutFile = Annotated[str, typer.Option(help="Also write the figures to this JSON file.")]
Quick = Annotated[bool, typer.Option("--quick", help="The smallest sizes only.")]


@bench.command("aggregation")
def bench_aggregation(out: OutFile = "", quick: Quick = False) -> None:
    """Time and peak memory of every aggregation rule, next to Flower's FedAvg."""
    from simulations.bench.aggregation import QUICK, Sizes, bench

    bench(QUICK if quick else Sizes(), wide_console(), out)


@bench.command("exactness")
def bench_exactness() -> None:
    """Error of every aggregation rule against a dense float64 oracle, as Markdown."""
    from simulations.bench.exactness import table

    typer.echo(table())


@bench.command("step")
def bench_step(
    family: Annotated[
        str, typer.Option(help="encoder-labels (MiniLM) or causal-lm (SmolLM2).")
    ] = "encoder-labels",
    out: OutFile = "",
    quick: Quick = False,
) -> None:
    """Speed and peak memory of the local step, next to the Hugging Face Trainer and Opacus."""
    from simulations.bench import step, step_causal

    module = choose("--family", family, {"encoder-labels": step, "causal-lm": step_causal})
    module.bench(module.QUICK if quick else module.WORKLOADS, wide_console(), out)


@bench.command("scoring")
def bench_scoring(out: OutFile = "", quick: Quick = False) -> None:
    """Texts per second where a language model chooses among 14 and 77 labels, next to the plain
    model."""
    from simulations.bench.scoring import CASES, QUICK, bench

    bench(QUICK if quick else CASES, wide_console(), out)


@bench.command("privacy")
def bench_privacy(out: OutFile = "", quick: Quick = False) -> None:
    """What the mechanism `record` costs a local step, next to an ordinary one."""
    from simulations.bench.privacy import QUICK, WORKLOADS, bench

    bench(QUICK if quick else WORKLOADS, wide_console(), out)


@bench.command("secure")
def bench_secure(out: OutFile = "", quick: Quick = False) -> None:
    """Bytes and time of secure aggregation, for growing numbers of sites."""
    from simulations.bench.secure import QUICK, Sizes, bench

    bench(QUICK if quick else Sizes(), wide_console(), out)


@bench.command("secure-share")
def bench_secure_share(out: OutFile = "", quick: Quick = False) -> None:
    """What secure aggregation takes of the processor time of real rounds of ten clients."""
    from simulations.bench.secure_share import QUICK, ShareCase, bench

    bench(QUICK if quick else ShareCase(), wide_console(), out)


@bench.command("memory")
def bench_memory(out: OutFile = "", quick: Quick = False) -> None:
    """Peak memory of the local step, measure by measure, next to the Hugging Face Trainer."""
    from simulations.bench.memory import QUICK, SIZES, bench

    bench(QUICK if quick else SIZES, wide_console(), out)


@bench.command("engine")
def bench_engine(out: OutFile = "", quick: Quick = False) -> None:
    """Seconds and memory of a round: engine inprocess next to Flower's simulation engine."""
    from simulations.bench.engine import QUICK, Sizes, bench

    bench(QUICK if quick else Sizes(), wide_console(), out)


@bench.command("scale")
def bench_scale(
    out: Annotated[str, typer.Option(help="Also write figures and a plot to this folder.")] = "",
    quick: Quick = False,
) -> None:
    """What a round costs as tasks, clients, rank, labels and texts grow."""
    from simulations.bench.scale import bench
    from simulations.bench.scale_axes import axes, quick_axes

    bench(quick_axes() if quick else axes(), wide_console(), out)
