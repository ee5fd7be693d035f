"""What privacy costs a local step: the mechanism as it is beside an ordinary step, in pairs.

Same model, same examples, same learning factors. The private step samples, so its batches differ in
size and mix lengths; a rate counts the examples that were in a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.paired import Contestant, Timed, ratios, timed_in_turn
from simulations.bench.workloads import Turn, Workload, texts

PLAIN, PRIVATE = "plain", "record"
WINDOWS = 9
WORKLOADS = (
    Workload(0, 16, 256, 4),
    Workload(0, 128, 256, 4),
    Workload(64, 16, 256, 4),
    Workload(64, 64, 256, 4),
)
QUICK = (Workload(64, 8, 16),)


@dataclass(frozen=True)
class Case:
    """What both contestants train: ``factors``, of ``{"lora_A", "lora_B"}``."""

    workload: Workload
    factors: frozenset[str]


class PrivacyWork:
    """One model that keeps learning, window after window, with or without the mechanism."""

    def __init__(self, case: Case, private: bool) -> None:
        import torch

        from deal_core.models import Encoded
        from simulations.bench.step_deal import new_model

        loaded = texts(case.workload)
        self._case, self._private, self._labels = case, private, loaded.labels
        self._model = new_model(torch.float32)
        self._turn = Turn(case.workload, [Encoded(*example) for example in loaded.train])

    def window(self) -> Mapping[str, float]:
        """One epoch over the next examples, on average or exactly."""
        from deal_core.config.experiment import TrainConfig
        from deal_core.methods.shared.plain import Plain
        from deal_core.training.loop import run_local_steps

        data = self._turn.next()
        config = TrainConfig(batch_size=self._case.workload.batch_size)
        source = self._source(data, config)
        counted = Counted(source)
        objective = Plain(self._model, self._labels, data)
        run_local_steps(self._model, objective, counted, self._case.factors, config)
        return {"work": max(1, counted.examples)}

    def report(self) -> Mapping[str, float]:
        """Return no figure beside the time."""
        return {}

    def _source(self, data: Sequence[Any], config: Any) -> Any:
        from deal_core.privacy.interface import RecordId
        from deal_core.privacy.mechanisms.noise import SecureNoise
        from deal_core.privacy.mechanisms.private_gradients import PrivateGradients
        from deal_core.randomness import seeded
        from deal_core.training.nonprivate_gradients import NonPrivateGradients

        if not self._private:
            return NonPrivateGradients(data, 1, config, seeded("bench", self._turn.number))
        return PrivateGradients(
            data=data,
            record_ids=[RecordId("bench", row) for row in range(len(data))],
            sample_rate=config.batch_size / len(data),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            steps=len(data) // config.batch_size,
            expected_batch=config.batch_size,
            noise=SecureNoise(),
        )


class Counted:
    """Passes everything on, and counts the examples in batches."""

    def __init__(self, source: Any) -> None:
        self._source, self.examples = source, 0

    def batches(self) -> Any:
        """Yield the batches of the source, and count their examples."""
        for batch in self._source.batches():
            self.examples += len(batch)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def privacy_work(case: Case, private: bool) -> PrivacyWork:
    """Set up in a process of its own."""
    return PrivacyWork(case, private)


def measured(case: Case) -> tuple[Timed, Timed]:
    """The plain step and the private one, in turn."""
    made = [Contestant(n, privacy_work, (case, n == PRIVATE)) for n in (PLAIN, PRIVATE)]
    done = timed_in_turn(made, WINDOWS)
    return done[PLAIN], done[PRIVATE]


def bench(workloads: Sequence[Workload], console: Console, out: str = "") -> None:
    """Measure, print, and write the figures as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    table = Table(title="Cost of a private step", title_justify="left")
    for name in ("texts", "batch", "factors", "plain, examples/s", "record, examples/s", "cost"):
        table.add_column(name)
    rows: list[dict[str, Any]] = []
    for workload in workloads:
        for factors in (frozenset({"lora_B"}), frozenset({"lora_A", "lora_B"})):
            plain, private = measured(Case(workload, factors))
            costs = ratios(plain, private)
            name = " and ".join(sorted(factors))
            cost = f"{statistics.median(costs):.2f} ({costs[0]:.2f}-{costs[-1]:.2f})"
            rates = f"{plain.rate:.1f}", f"{private.rate:.1f}"
            table.add_row(workload.name, str(workload.batch_size), name, *rates, cost)
            where = {"texts": workload.name, "batch_size": workload.batch_size, "factors": name}
            rows.append({**where, "plain": plain.rate, "record": private.rate, "cost": costs})
    console.print(table)
    console.print("Cost: time of an example, record over plain, median of the pairs (range).")
    write({"rows": rows})
