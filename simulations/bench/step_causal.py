"""``deal bench step --family causal-lm``: a language model's local step beside the Hugging Face
Trainer and the machine, in the default precision."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.paired import Contestant, Timed, ratios, timed_in_turn
from simulations.bench.workloads import Workload

SMOLLM2 = "embedded:smollm2"
WINDOWS = 3
REFERENCE = "trainer, all layers"
PRODUCTS = "products"
WORKLOADS = (
    Workload(64, 16, 32, options=14),
    Workload(64, 8, 16),
    Workload(128, 8, 8),
    Workload(256, 8, 8),
)
QUICK = (Workload(16, 2, 2),)


@dataclass(frozen=True)
class CausalLine:
    """One contestant on one workload; ratios are pair by pair over the windows.

    Attributes:
        against: rate over that of the reference: (smallest, median, largest).
        limit_share: of the machine's rate of matrix products, where all that a plain step computes
            were computed; above 1 where it is not.
        memory: peak over the reference's.
    """

    workload: Workload
    timed: Timed
    against: tuple[float, float, float]
    limit_share: float
    memory: float | None

    @property
    def core_rate(self) -> float:
        """Examples per second and core."""
        return self.timed.rate / self.timed.report["threads"]

    def as_json(self) -> dict[str, Any]:
        """Flat."""
        return {
            "tokens": self.workload.tokens,
            "options": self.workload.options,
            "batch_size": self.workload.batch_size,
            "contestant": self.timed.name,
            "examples_per_second": self.timed.rates,
            "examples_per_core_second": self.core_rate,
            "reference": REFERENCE,
            "ratio": self.against,
            "limit_share": self.limit_share,
            "peak_bytes": self.timed.peak_bytes,
            "peak_ratio": self.memory,
            **self.timed.report,
        }


def default_precision() -> str:
    """Return the precision of the base model that a run has here."""
    from deal_core.config.experiment import TrainConfig
    from deal_core.models.loading import best_device
    from deal_core.training.precision import compute_dtype

    return str(compute_dtype(TrainConfig(), best_device())).removeprefix("torch.")


def contestants(workload: Workload, precision: str, name: str) -> list[Contestant]:
    """Return all that are compared on a workload; texts of the first window come again in the
    others, but for the one that says so."""
    from simulations.bench.causal_deal import causal_deal_work
    from simulations.bench.causal_trainer import causal_trainer_work
    from simulations.bench.limit import causal_sizes, product_work

    given = (workload, precision, name)
    half = layers(name) // 2
    fresh = replace(workload, windows=WINDOWS + 1)
    return [
        Contestant(PRODUCTS, product_work, (precision, causal_sizes(name))),
        Contestant(REFERENCE, causal_trainer_work, given),
        Contestant("deal, all layers, nothing shared", causal_deal_work, (*given, 0, False)),
        Contestant("deal, all layers", causal_deal_work, given),
        Contestant("deal, upper half, new texts", causal_deal_work, (fresh, *given[1:], half)),
        Contestant("deal, upper half", causal_deal_work, (*given, half)),
    ]


def layers(name: str) -> int:
    """Return how many layers a model has; no weights are read."""
    from transformers import AutoConfig

    from deal_core.models.loading import pretrained

    count: int = pretrained(AutoConfig, name).num_hidden_layers
    return count


def bench(
    workloads: Sequence[Workload], console: Console, out: str = "", name: str = SMOLLM2
) -> None:
    """Measure workload by workload, print each table as it is done, write all as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    precision = default_precision()
    rows: list[dict[str, Any]] = []
    for workload in workloads:
        lines = measured(workload, precision, name)
        console.print(table(workload, precision, lines))
        rows += [line.as_json() for line in lines]
        write({"model": name, "precision": precision, "rows": rows})
    console.print(
        "Tokens: of a text; prompt and answer come on top. Ratio: examples per second over the "
        "Trainer's, median of the pairs (smallest to largest). Limit: matrix products of this "
        "machine over the operations of a plain step with all layers adapted; more than 100 % "
        "where these need not be done: what prompts begin with is computed once a batch, layers "
        "below the adapted ones once a text. Memory: peak of the process over the Trainer's. "
        "Loss: of answers that were not trained on, at the end.",
        soft_wrap=True,
    )


def measured(workload: Workload, precision: str, name: str) -> list[CausalLine]:
    """Run all contestants on a workload in turn."""
    from simulations.bench.limit import causal_operations

    done = timed_in_turn(contestants(workload, precision, name), WINDOWS)
    products = done.pop(PRODUCTS)
    limit = products.rate / causal_operations(name, sequence_tokens(workload, name))
    return [_line(workload, each, done, limit) for each in done.values()]


def sequence_tokens(workload: Workload, name: str) -> int:
    """Return the tokens of a prompt with its answer."""
    from transformers import AutoTokenizer

    from deal_core.config.experiment import ModelConfig
    from deal_core.models.loading import pretrained
    from simulations.bench.prompts import prompted, questions

    asked = questions(1, workload.tokens, workload.options)
    tokenizer = pretrained(AutoTokenizer, name)
    (item,) = prompted(tokenizer, ModelConfig(), asked.train, asked.labels, workload.tokens)
    return len(item.prompt) + len(item.answer)


def _line(workload: Workload, timed: Timed, done: Mapping[str, Timed], limit: float) -> CausalLine:
    reference = done[REFERENCE]
    pairs = ratios(timed, reference)
    memory = None
    if timed.peak_bytes and reference.peak_bytes:
        memory = timed.peak_bytes / reference.peak_bytes
    against = pairs[0], statistics.median(pairs), pairs[-1]
    return CausalLine(workload, timed, against, timed.rate / limit, memory)


def table(workload: Workload, precision: str, lines: Sequence[CausalLine]) -> Table:
    """One line a contestant."""
    drawn = Table(title=f"{workload.name}, batch {workload.batch_size}, {precision}")
    drawn.add_column("contestant")
    for name in ("examples/core-s", "ratio", "of limit", "peak MB", "memory", "loss"):
        drawn.add_column(name, justify="right")
    for line in lines:
        least, middle, most = line.against
        peak = line.timed.peak_bytes
        drawn.add_row(
            line.timed.name,
            f"{line.core_rate:.2f}",
            f"{middle:.2f} ({least:.2f}-{most:.2f})",
            f"{line.limit_share:.0%}",
            f"{peak / 1e6:.0f}" if peak else "–",
            f"{line.memory:.2f}" if line.memory else "–",
            f"{line.timed.report['loss']:.2f}",
        )
    return drawn
