"""The experiment: one TOML file, parsed once into frozen models.

Every key has a default; the defaults together are a run on the embedded model and data. The
same keys work in an experiment file, in ``--set table.key=value`` and, flattened with dots, in
Flower's run config (``flwr run . -c adapter.rank=16``).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deal_core.errors import UserError, nearest


class Table(BaseModel):
    """Base of every table: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Table):
    """The frozen base model."""

    family: str = "encoder-labels"
    """Model family: ``encoder-labels`` or ``causal-lm``."""
    name: str = "embedded:minilm"
    """``embedded:NAME``, a folder, or a Hugging Face hub name."""
    logit_scale: float = Field(20.0, gt=0)
    """Multiplier of the cosine between text and label (encoder-labels)."""
    instruction: str = "Classify the text. Answer with one of the options."
    """First line of the prompt (causal-lm)."""


class AdapterConfig(Table):
    """The two adapters of every adapted layer."""

    rank: int = Field(8, ge=1)
    """Rank of the current adapter."""
    retained_rank: int = Field(16, ge=1)
    """Rank of the retained adapter: all earlier tasks, compressed."""
    lora_alpha: float = Field(16.0, gt=0)
    """The current adapter is scaled by ``lora_alpha / rank``."""
    client_ranks: tuple[int, ...] = ()
    """Ranks of the clients' own adapters, dealt out in turn, none above ``rank`` (rules for
    mixed ranks only); empty: ``rank`` for all."""
    target_modules: tuple[str, ...] = ()
    """Names of the adapted linear layers; empty: the family's default (q and v)."""


class PartitionConfig(Table):
    """How one data set is divided among simulated clients."""

    kind: str = "dirichlet"
    """``iid``, ``dirichlet``, ``pathological`` or ``column``."""
    alpha: float = Field(0.5, gt=0)
    """Dirichlet concentration over labels: small is skewed, large is uniform."""
    labels_per_client: int = Field(2, ge=1)
    """Labels that each client holds (pathological)."""
    column: str = ""
    """The column whose values name the client (column)."""


class HubTask(Table):
    """One task read with ``datasets.load_dataset``."""

    path: str
    config: str = ""
    train_split: str = "train"
    test_split: str = "test"
    text_column: str = ""
    """Empty: ``data.text_column``."""
    pair_column: str = ""
    label_column: str = ""
    """Empty: ``data.label_column``."""
    label_text: dict[str, str] = {}
    """Label value (as text) to the words the model sees; empty: the data set's names."""


class DataConfig(Table):
    """Where the stream of tasks comes from."""

    source: str = "medmcqa"
    """``medmcqa`` (embedded), ``files`` or ``hub``."""
    path: str = ""
    """Folder that holds one folder per task (files)."""
    tasks: tuple[str, ...] = ()
    """Tasks in the order they are learnt; empty: all, in the source's order."""
    text_column: str = "text"
    pair_column: str = ""
    """Second text column, joined to the first; empty: none."""
    label_column: str = "label"
    max_train: int = Field(0, ge=0)
    """Training examples per task over all clients; 0: no limit."""
    max_test: int = Field(0, ge=0)
    """Test examples per task over all clients; 0: no limit."""
    cache_tokens: bool = True
    """Keep token ids in the user's cache folder for the next process; they are the texts in
    another form."""
    partition: PartitionConfig = PartitionConfig()
    hub: dict[str, HubTask] = {}
    """Task name to the hub data set behind it (hub)."""


class StreamConfig(Table):
    """How tasks arrive."""

    schedule: Literal["synchronous", "per-client"] = "synchronous"
    """``synchronous``: all clients work on one task at a time, in the order of ``data.tasks``;
    ``per-client``: each on its own tasks, in its own order; who is through idles. The keys below
    are for that."""
    consolidate_every: int = Field(0, ge=0)
    """Rounds from one consolidation, and evaluation, to the next; 0: ``federation.rounds``."""
    tasks_per_client: int = Field(0, ge=0)
    """Tasks that a client meets, drawn with their order by the seed; 0, or more than there are:
    all."""
    orders: dict[str, tuple[str, ...]] = {}
    """Number of a client (from 0) to its tasks in their order, instead of a draw; an empty list:
    it only evaluates."""


class FederationConfig(Table):
    """Clients and rounds."""

    clients: int = Field(2, ge=1)
    """Clients that take part; 2 is what plain ``flwr run .`` simulates."""
    clients_per_round: int = Field(0, ge=0)
    """Clients sampled in each round; 0: all."""
    rounds: int = Field(2, ge=1)
    """Rounds per task."""
    local_epochs: int = Field(1, ge=1)
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the sampled clients whose valid reply a round needs."""
    deadline_seconds: float = Field(3600.0, gt=0)
    """A round stops waiting after this time."""


class RetentionConfig(Table):
    """Compression of all earlier tasks into the retained adapter (deal)."""

    enabled: bool = True
    """False: every task keeps training the same adapter, and nothing is compressed; needs
    ``adapter.retained_rank`` of at least ``adapter.rank``, for the teacher. The keys below
    then have no effect."""
    filter: str = "identity"
    """Gains of the kernels: ``identity`` (plain truncation; until the other is measured) or
    ``wiener`` (singular values near the noise floor shrink, those below it vanish). At the end
    of every task all that was learnt passes the filter, what earlier tasks left once more."""
    kernels: int = Field(16, ge=2)
    """Heat kernels over a layer's spectrum, centred at its quantiles."""
    width: float = Field(0.5, gt=0)
    """Width of a kernel in units of ``S_1 / kernels``: towards 0 each singular value has the
    gain of its nearest centre, towards infinity all have the mean gain."""
    noise: float = Field(0.0, ge=0)
    """Noise floor, in singular values of a layer's update; 0: estimated for each layer from
    what lies beyond the retained rank, nothing while everything fits into it."""


class UpdateConfig(Table):
    """Penalty on what an update does to retained knowledge (deal). Off until it is measured."""

    enabled: bool = False
    lambda1: float = Field(0.01, ge=0)
    """Weight of interference with retained directions, relative to their strength."""
    lambda2: float = Field(0.001, ge=0)
    """Weight of the size of the update outside of them."""
    a: float = 2.0
    """Power of the interference: large is lenient below 1 (as strong as what is retained) and
    steep above. A direction of strength sigma weighs like ``sigma^(1 - a)``: large powers
    protect weak directions most."""
    b: float = Field(2.0, ge=1)
    """Power of the size, at most ``a``."""

    @model_validator(mode="after")
    def _steep_where_knowledge_lives(self) -> Self:
        if self.a < self.b:
            raise ValueError(f"a ({self.a:g}) must not be below b ({self.b:g}); raise a or lower b")
        return self


class DistillationConfig(Table):
    """Distillation from the model as it was at the start of the task (deal, lwf)."""

    weight: float = Field(1.0, ge=0)
    """0 switches distillation off."""
    temperature: float = Field(2.0, gt=0)


class EwcConfig(Table):
    """Elastic weight consolidation (ewc)."""

    weight: float = Field(1000.0, ge=0)
    """Of half the squared change of every factor entry, times its Fisher information."""


class OLoraConfig(Table):
    """Orthogonality to the adapters of earlier tasks (olora)."""

    weight: float = Field(0.5, ge=0)
    """Of ``||A_earlier A^T||_F^2``, summed over layers."""


class ReplayConfig(Table):
    """Examples of earlier tasks that a client keeps and trains on again (replay): not private."""

    share: float = Field(0.1, ge=0, le=1)
    """Of the client's examples of every earlier task, rounded up; 1: all."""
    weight: float = Field(1.0, ge=0)
    """Of an old example's loss beside that of a new one."""


class MethodConfig(Table):
    """The continual-learning method."""

    name: str = "deal"
    """``deal``, or a baseline: ``sequential``, ``lwf``, ``ewc``, ``olora``, ``replay``."""
    fresh_adapter: bool = True
    """A task's new adapter starts outside of the retained directions; false: in directions
    drawn without regard to them (deal with retention; the first task is the same)."""
    retention: RetentionConfig = RetentionConfig()
    update: UpdateConfig = UpdateConfig()
    distillation: DistillationConfig = DistillationConfig()
    ewc: EwcConfig = EwcConfig()
    olora: OLoraConfig = OLoraConfig()
    replay: ReplayConfig = ReplayConfig()


class AggregationConfig(Table):
    """How client updates become one adapter."""

    rule: str = "fedit"
    norm_bound: float = Field(0.0, ge=0)
    """Largest Frobenius norm of one layer's update; above: quarantined; 0: no bound."""
    rank_cap: int = Field(0, ge=0)
    """Largest rank of the residual that an exact rule adds to the retained adapter in a
    round; what is cut is reported as ``lost``; 0: no cap, nothing is cut."""
    robust: str = "none"
    """Protection against bad updates, before the rule: ``none``, ``median``,
    ``trimmed-mean``, ``multi-krum`` or ``direction``."""
    trim_fraction: float = Field(0.2, ge=0, lt=0.5)
    """Share of the clients cut at each end of every coordinate, rounded up (trimmed-mean)."""
    byzantine: int = Field(1, ge=0)
    """Bad clients that a round must withstand (multi-krum)."""


class WireConfig(Table):
    """How adapters travel."""

    dtype: str = "float32"
    """``float32`` (exact), ``bfloat16`` or ``int8`` (with error feedback at the client)."""


class TrainConfig(Table):
    """The local optimiser."""

    learning_rate: float = Field(2e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(128, ge=8)
    """Tokens kept of a text."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen model and its activations; auto: bfloat16 where the hardware multiplies it
    fast (CUDA, processors with AMX or AVX-512 BF16), float32 elsewhere. Adapters are always
    float32."""
    tokens_per_pass: int = Field(2048, ge=1)
    """Tokens, padding included, in one pass of a training batch: bounds memory, not the step."""
    weight_decay: float = Field(0.0, ge=0)


class FaultsConfig(Table):
    """Misbehaving clients, for experiments on robustness (engine ``inprocess`` only)."""

    kind: str = "none"
    """``none``, ``scaled`` (ten times the update), ``sign-flipped`` or ``not-finite``."""
    clients: tuple[int, ...] = ()
    """Numbers of the clients that misbehave, in every round."""


class RunConfig(Table):
    """The run itself."""

    seed: int = Field(0, ge=0)
    engine: str = "inprocess"
    """``inprocess`` or ``flower``."""
    threads: int = Field(0, ge=0)
    """Torch threads of a process that trains; 0: all cores, divided among the workers."""
    workers: int = Field(0, ge=0)
    """Processes that train clients at the same time; 0: one per GPU, or, without a GPU, as many
    as there are cores for their threads."""
    out: str = ""
    """Run folder; empty: ``runs/NAME-seedN``."""
    resume: bool = False
    """Continue the run in ``out`` from its checkpoint."""


class Experiment(Table):
    """A whole experiment; ``Experiment()`` runs on what is embedded."""

    description: str = ""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    federation: FederationConfig = FederationConfig()
    method: MethodConfig = MethodConfig()
    aggregation: AggregationConfig = AggregationConfig()
    wire: WireConfig = WireConfig()
    train: TrainConfig = TrainConfig()
    faults: FaultsConfig = FaultsConfig()
    run: RunConfig = RunConfig()


def parse_experiment(tables: Mapping[str, Any], where: str) -> Experiment:
    """Check nested tables and return the experiment.

    Raises:
        UserError: an unknown key (with the nearest known one) or a wrong type; the
            message starts with ``where`` and names the key.
    """
    try:
        return Experiment.model_validate_json(json.dumps(tables), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None
    except TypeError as error:
        raise UserError(f"{where}: {error}; use strings, numbers, booleans and lists") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(location[-1], _known_keys(location[:-1]))}"
    if problem["type"] == "value_error":  # a model's own: keys that do not go together
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"key '{key}' should be {message}, but is {json.dumps(problem['input'])}"


def _known_keys(path: Sequence[str]) -> list[str]:
    table: type[BaseModel] = Experiment
    for part in path:
        field = table.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return list(HubTask.model_fields)
        table = field.annotation
    return list(table.model_fields)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: the file is missing, unreadable or no TOML; the message names the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``tables`` with each ``table.key=value`` applied.

    The value is read as TOML; a bare word is a string.

    Raises:
        UserError: no ``=`` in an override, or a path that runs through a plain value.
    """
    result: dict[str, Any] = json.loads(json.dumps(tables))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override}: write it as table.key=value")
        *parents, leaf = key.strip().split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {override}: '{parent}' is a value, not a table")
        table[leaf] = _toml_value(text.strip())
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def flatten(experiment: Experiment) -> dict[str, bool | int | float | str]:
    """Return Flower's run config: dotted keys to scalars; lists and dicts as JSON text."""
    flat: dict[str, bool | int | float | str] = {}

    def visit(model: BaseModel, prefix: str) -> None:
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                visit(value, f"{prefix}{name}.")
            elif isinstance(value, (tuple, dict)):
                flat[prefix + name] = json.dumps(model.model_dump(mode="json")[name])
            else:
                flat[prefix + name] = value

    visit(experiment, "")
    return flat


def from_run_config(run_config: Mapping[str, Any]) -> Experiment:
    """Undo :func:`flatten`; the one parser of Flower's run config.

    Raises:
        UserError: as :func:`parse_experiment`.
    """
    structured = _structured_keys()
    tables: dict[str, Any] = {}
    for key, value in run_config.items():
        *parents, leaf = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = json.loads(value) if key in structured else value
    return parse_experiment(tables, "run config")


@cache
def _structured_keys() -> frozenset[str]:
    return frozenset(key for key in flatten(Experiment()) if _is_structured(key))


def _is_structured(key: str) -> bool:
    value: Any = Experiment()
    for part in key.split("."):
        value = getattr(value, part)
    return isinstance(value, (tuple, dict))
