"""What a run has measured so far, its results file, and what clients say that privacy has cost;
without torch, for programs that only read them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deal_core.atomic_write import atomic_write
from deal_core.config.data import MeasureName
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.privacy.events import unit_text


class Spending(BaseModel):
    """What a client says of its noise and its ledger: ``epsilon`` of all that the ledger holds, at
    ``delta``."""

    model_config = ConfigDict(frozen=True)

    epsilon: float = Field(ge=0)
    delta: float = Field(ge=0, le=1)
    n_delta: float | None = Field(None, ge=0)
    """``delta`` times the number of its records, or groups; None: the client does not say."""
    simulation_only: bool
    """Some noise came from a seed."""
    disjoint_tasks: bool = False
    """No record is in two tasks, so that they compose in parallel."""
    void: bool = False
    """Something of training records was released without protection: for these no epsilon holds."""
    assumes_more: bool = False
    """It counts on others than this run's settings say: earlier releases do, or the site takes the
    keys of other sites from the server."""


def spending_in(figures: Mapping[str, Any]) -> Spending | None:
    """Return what figures say of privacy, None: nothing; a ValueError where it cannot be."""
    if not {"epsilon", "delta"} & figures.keys():
        return None
    return Spending.model_validate(figures)


Counts = list[list[int | float]]
"""``[correct, examples]`` per task, or ``[correct, examples, correct_all]``; empty: the evaluation
did not ask about the task."""


class History(BaseModel):
    """What has been measured so far."""

    model_config = ConfigDict(frozen=True)

    evaluations: tuple[dict[str, Counts], ...] = ()
    """Zero-shot first; an empty one: its counts are not known."""
    bytes_up: tuple[float, ...] = ()
    """One number a round, as ``bytes_down`` and ``aggregation_error``."""
    bytes_down: tuple[float, ...] = ()
    evaluation_bytes_down: tuple[float, ...] = ()
    """One number for each evaluation."""
    aggregation_error: tuple[float | None, ...] = ()
    seconds: dict[str, float] = {}
    """Per phase (``train``, ``evaluate``), over all starts of the run."""
    peak_rss_bytes: int = 0
    """Largest over the starts."""
    distrusted: tuple[str, ...] = ()
    """Clients that a robust rule left out when it last had an update of theirs."""
    spent: dict[str, Spending] = {}
    """Client to what its privacy has cost, all rounds and tasks together."""

    def charged(self, told: Mapping[str, Spending]) -> tuple[History, dict[str, float]]:
        """Add what clients say of their ledgers after a round.

        Returns:
            What is known now, and each client that says less than before to what it says: its
            ledger is older than it was, and what was known of it stands.
        """
        less = {
            client: now.epsilon
            for client, now in told.items()
            if (before := self.spent.get(client)) is not None
            and now.delta == before.delta
            and now.epsilon < before.epsilon
        }
        spent = {**self.spent, **{client: told[client] for client in told if client not in less}}
        return self.model_copy(update={"spent": spent}), less

    def judged(self, clients: Collection[str], excluded: Collection[str]) -> History:
        """Replace what is known of the clients of a round by its verdict."""
        distrusted = (set(self.distrusted) - set(clients)) | set(excluded)
        return self.model_copy(update={"distrusted": tuple(sorted(distrusted))})

    def appended(self, phase: str, seconds: float, **figures: float | None) -> History:
        """Append one round's, or one evaluation's, figures, and the time that it took."""
        total = {**self.seconds, phase: self.seconds.get(phase, 0.0) + seconds}
        lists = {name: (*getattr(self, name), value) for name, value in figures.items()}
        return self.model_copy(update={"seconds": total, **lists})


EARLIER = ", and whatever the client's ledger held before"
MORE_TRUST = "and on more, which the certificate of a client's ledger names"
"""Behind whom a run's settings count on, where a client has said that its ledger counts on more."""
VOID = "void for records of which a client has released something without protection"


def extent(disjoint_tasks: bool) -> str:
    """What an epsilon of a run composes over, in words."""
    return "all rounds, a record being in one task" if disjoint_tasks else "all rounds and tasks"


def whole_trust(assumes: str, more: bool) -> str:
    """Whom an epsilon takes to be honest, in words: whom the settings say, and perhaps ``more``."""
    return f"{assumes}, {MORE_TRUST}" if more else assumes


def rounded_up(value: float, digits: int) -> str:
    """Return a number with so many significant digits, and never a smaller one: "at most" is
    true of it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    last = math.floor(math.log10(abs(value))) + 1 - digits
    step = Decimal(1).scaleb(last)
    up = Decimal(repr(value)).quantize(step, rounding=ROUND_CEILING)
    return f"{float(up):.{digits}g}"


SCHEMA: Literal[3] = 3
"""Version of ``results.json``."""

Accuracy = float | None
"""0 to 1; None where a client has no test example of a task."""


class Strict(BaseModel):
    """Frozen, and no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage(Strict):
    """What lies between two consolidations, as planned: a row of the accuracy matrix is its end."""

    rounds: int
    """Of learning."""
    work: dict[str, list[str]]
    """Task, in the stream's order, to the clients whose turn it is in some of its rounds (with
    ``federation.participants`` only those train)."""


class ClientResult(Strict):
    """One client's own test examples."""

    accuracy_matrix: list[list[Accuracy]]
    """As the global one; None where the client has no example, or its counts did not arrive."""
    zero_shot: list[Accuracy] = Field(default_factory=list)
    average_accuracy: Accuracy
    """Mean of the last row over the tasks that the client has."""
    test_examples: list[int]
    """Per task, as last reported."""


OUTSIDE = {"clear": "in the clear", "summed": "as exact sums over all sites"}
"""``privacy.metrics`` to how counts left that no noise protects."""


class Privacy(Strict):
    """What was spent. With mechanism ``none`` there is no guarantee and no epsilon. The flags are
    those of :class:`Spending`, true where they are of some client."""

    mechanism: str
    unit: str | None = None
    """What an adversary cannot tell the presence of: ``record`` or ``group``."""
    unit_column: str = ""
    """Whose values make the groups; sites have their own name for it."""
    assumes: str = ""
    """Whom the epsilon takes to be honest; all others are adversaries."""
    delta: float | None = None
    """The largest of the clients'; every epsilon holds at it."""
    n_delta: float | None = None
    """The largest of the clients': so many units are revealed on average, at worst."""
    epsilon: dict[str, float] = {}
    """Client to what its own ledger composes to: this run, and what was released before."""
    disjoint_tasks: bool = False
    void: bool = False
    assumes_more: bool = False
    silent: int = 0
    """So many clients tell no epsilon."""
    simulation_only: bool = False
    metrics: str = "clear"
    """How counts of right answers on test records left."""

    @property
    def unit_text(self) -> str:
        """The unit in words, as it follows 'per'; the column of groups included."""
        return unit_text(self.unit or "", self.unit_column)

    @property
    def extent(self) -> str:
        """What an epsilon composes over, in words."""
        return f"{extent(self.disjoint_tasks)}{EARLIER}"

    @property
    def trust(self) -> str:
        """Whom an epsilon takes to be honest, in words."""
        return whole_trust(self.assumes, self.assumes_more)

    @property
    def tellers(self) -> str:
        """Over whom the largest epsilon is the largest."""
        telling = len(self.epsilon)
        if not self.silent:
            return "clients"
        return f"the {telling} of {telling + self.silent} clients that tell"

    @property
    def meaning(self) -> str:
        """What the largest epsilon means: delta, unit, extent, trust, and what it is void for."""
        times = "" if self.n_delta is None else f" (n delta <= {rounded_up(self.n_delta, 3)})"
        parts = [
            f"at delta = {rounded_up(self.delta or 0.0, 3)}{times} per {self.unit_text}, over "
            f"{self.extent} (largest over {self.tellers}, as last told)",
            self.trust,
            VOID if self.void else "",
            "simulation only: the noise came from a seed" if self.simulation_only else "",
            "counts of right answers on test records may leave "
            f"{OUTSIDE[self.metrics]}, outside of it"
            if self.metrics in OUTSIDE
            else "",
        ]
        return "; ".join(part for part in parts if part)


class Wire(Strict):
    """Payload bytes, mean over the clients of a round: one number a round, and one for each
    evaluation."""

    bytes_up: list[float]
    bytes_down: list[float]
    evaluation_bytes_down: list[float] = []

    @property
    def received(self) -> float:
        """Bytes that a client in every round has received in the whole run."""
        return sum(self.bytes_down) + sum(self.evaluation_bytes_down)


class Measures(Strict):
    """Accuracies, 0 to 1, and what follows from them. All are empty or None where too few clients
    reported their counts of right answers."""

    accuracy_matrix: list[list[Accuracy]]
    """A row per stage, a column per task; None: not measured (``stream.evaluate_every``)."""
    zero_shot: dict[str, float]
    average_accuracy: float | None = Field(ge=0, le=1)
    backward_transfer: float | None
    """Of clients that were heard in all evaluations, as the next two; None: there are none, or sums
    are over other clients."""
    forward_transfer: float | None
    forgetting: float | None = Field(ge=0, le=1)
    per_client: dict[str, ClientResult]


class ClassIncremental(Measures):
    """The measures among all labels seen so far: row ``i``, column ``j`` of the matrix is accuracy
    on task ``j`` after stage ``i`` among the labels of all tasks learnt by then and of task ``j``
    itself (docs/method.md, (M39)). Before the first stage these are its own, so that zero-shot
    accuracy is that of the results."""

    average_accuracy: float = Field(ge=0, le=1)


class Results(Measures):
    """``results.json``; accuracies are among the labels of the test example's own task."""

    schema_version: Literal[3] = SCHEMA
    config: Experiment
    engine: str
    seed: int
    tasks: list[str]
    measures: dict[str, Literal["accuracy"] | MeasureName] = Field(default_factory=dict)
    """Task to what its entries in the matrix are: the share of right answers, or, where answers are
    texts, the task's measure."""
    stages: list[Stage]
    unheard: list[int] = Field(default_factory=list)
    """Of each evaluation, zero-shot first, how many clients' counts are missing that another has;
    empty: none. A row is of who was heard in it."""
    class_incremental: ClassIncremental | None = None
    """None where it is not known, or the model family does not score all labels in one pass."""
    privacy: Privacy
    wire: Wire
    aggregation_error: list[float | None]
    seconds: dict[str, float]
    peak_rss_bytes: int
    versions: dict[str, str]
    labels: dict[str, list[str]] = Field(default_factory=dict)
    """Task to the names of its labels, which are public; none: its answers are texts."""
    names: list[str] = Field(default_factory=list)
    """Of clients, by number: of sites, or of the partition column; empty: they have none."""
    finished: str = ""
    """When, UTC, ISO 8601."""
    commit: str = ""
    """Of this project, where the server ran from a checkout of it (``-dirty``: with changes)."""

    @property
    def worst_client(self) -> tuple[str, float] | None:
        """The client whose own average accuracy is smallest, and that; None: not known."""
        own = ((name, each.average_accuracy) for name, each in self.per_client.items())
        known = [(name, value) for name, value in own if value is not None]
        return min(known, key=lambda each: each[1], default=None)


def write_results(path: Path, results: Results) -> None:
    """Write atomically; what is written has been read back and validated first."""
    text = results.model_dump_json(indent=1)
    Results.model_validate_json(text)
    atomic_write(path, text + "\n")


def read_results(folder: Path) -> Results:
    """Return ``results.json`` of a run folder, read and checked.

    Raises:
        UserError: missing (the run has not finished) or not valid.
    """
    path = folder / "results.json"
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("schema_version", SCHEMA) != SCHEMA:
            found = data["schema_version"]
            raise UserError(f"{path}: of schema version {found}, not {SCHEMA}; run it again")
        return Results.model_validate(data)
    except FileNotFoundError:
        raise UserError(f"{path}: not there; the run has not finished (see --resume)") from None
    except (ValidationError, ValueError) as error:  # no JSON, no UTF-8, or not what it should say
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a valid results file ({reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
