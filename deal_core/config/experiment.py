"""The experiment: the tables of a TOML file as frozen models.

Every key has a default; the defaults together are a run on the embedded model and data. The
same keys work in an experiment file, in ``--set table.key=value`` and, as one JSON value, in
Flower's run config (:mod:`deal_core.config.file`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from deal_core.config.data import DataConfig, StreamConfig, Table
from deal_core.config.privacy import PrivacyConfig


class ModelConfig(Table):
    """The frozen base model."""

    family: str = "encoder-labels"
    """Model family: ``encoder-labels``; ``causal-lm`` or ``seq2seq-lm``, which answer in words
    (generating models); ``token-labels``, an encoder that tags words; ``sequence-classification``
    and ``token-classification``, with a head of their own; ``own-loss`` (of a model that a program
    passes)."""
    name: str = "embedded:minilm"
    """``embedded:NAME``, a folder, or a Hugging Face hub name; ``NAME@REVISION`` (a tag, or the
    hash of a commit) is the same at every institution, however the name moves on."""
    bits: Literal[0, 4, 8] = 0
    """Bits of a frozen weight: 8 or 4 save memory at some accuracy, and need the extra
    ``quantized``; 0: those of ``train.precision``."""
    template: str = "{instruction}\nOptions: {options}\nText: {text}\nAnswer:"
    """The prompt (generating models); a line with ``{options}`` is left out where the answer is a
    text."""
    max_new_tokens: int = Field(48, ge=1)
    """Tokens of an answer that is a text, at most (generating models)."""


class AdapterConfig(Table):
    """The two adapters of every adapted layer."""

    kind: str = "lora"
    """``lora``: on ``target_modules``. ``pooled``: on an identity map behind an encoder's pooling,
    along directions of label names that are public and frozen; few numbers learn, which suits noise
    (deal, encoder-labels)."""
    rank: int = Field(8, ge=1, le=8192)
    """Rank of the current adapter."""
    retained_rank: int = Field(64, ge=1, le=65536)
    """Rank of the retained adapter: all earlier tasks, compressed (deal with retention; whatever
    the number of tasks). Directions of several tasks share it: ``rank`` times the number of tasks
    keeps all of them; it travels once a stage."""
    lora_alpha: float = Field(16.0, gt=0)
    """The current adapter is scaled by ``lora_alpha / rank``."""
    client_ranks: tuple[int, ...] = ()
    """Ranks of the clients' own adapters, dealt out in turn, none above ``rank`` (rule ``flora``);
    empty: ``rank`` for all."""
    target_modules: tuple[str, ...] = ()
    """Names of the adapted linear layers; empty: those of queries and values in attentions."""
    first_layer: int = Field(0, ge=0)
    """First layer of the model that is adapted, of an encoder-decoder in both. What lies below
    never changes, so a text passes it once in a run (causal-lm)."""


class FederationConfig(Table):
    """Clients and rounds."""

    clients: int = Field(2, ge=1, le=1_000_000)
    """Clients that take part; 2 is the default."""
    clients_per_round: int = Field(0, ge=0)
    """Clients sampled in each round of learning; 0: all. Sums that a client gives once in a task
    are asked of all."""
    participants: tuple[int, ...] = ()
    """Numbers of the only clients that train, from 0; all evaluate; empty: all train."""
    rounds: int = Field(2, ge=1)
    """Rounds per task."""
    local_epochs: int = Field(1, ge=1)
    """Passes of a client over its data of the task in each round."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the sampled clients whose valid reply a round needs."""
    deadline_seconds: float = Field(3600.0, gt=0)
    """A round stops waiting after this time; for clients that are not connected, after two minutes
    at most."""
    sites: tuple[str, ...] = ()
    """Names of the sites that take part, under which they are registered; a site's place in the
    list is its number as a client (deployment). Empty: the clients are simulated."""

    @model_validator(mode="after")
    def _sites_are_the_clients(self) -> Self:
        said = "clients" in self.model_fields_set  # else deal submit counts the sites
        if self.sites and said and len(self.sites) != self.clients:
            raise ValueError(
                f"sites names {len(self.sites)}, but clients is {self.clients}; make them equal"
            )
        if len(set(self.sites)) < len(self.sites):
            raise ValueError("sites names a site twice; name each once")
        return self

    @model_validator(mode="after")
    def _participants_are_clients(self) -> Self:
        clients = len(self.sites) or self.clients
        unknown = [k for k in self.participants if not 0 <= k < clients]
        if unknown:
            raise ValueError(
                f"participants names client {unknown[0]}, but the clients are 0 to "
                f"{clients - 1}; name one of these, or raise clients"
            )
        return self


OWN_MEMORY = frozenset({"deal-reference", "ewc", "replay"})
"""Names of methods whose clients keep something from task to task or round to round on their own
disks, and learn from it: more than a request and the task at hand."""
READ_BY = {"ewc": ("ewc",), "prototype": ("prototype", "deal")}
"""Table of settings to the methods that read it; one that is not named here is for all."""


class RetentionConfig(Table):
    """Compression of all earlier tasks into the retained adapter (deal)."""

    filter: str = "svd"
    """What is kept of the singular values of all that was learnt, at the end of every task: ``svd``
    (the largest, as they are; nothing measured beats it) or ``wavelet`` (heat kernels over the
    spectrum: values near the noise floor shrink, those far below it vanish); ``none``: nothing is
    compressed, and every task goes on with the same adapter."""
    apart: bool = False
    """Whether each task keeps an adapter of its own within ``adapter.retained_rank``, and a router
    chooses among them, by class means of the frozen model (generative models). Otherwise all that
    was learnt is one sum."""


class UpdateConfig(Table):
    """Controlled update: a penalty on what an update does to retained knowledge (deal). Off with
    weights of 0: beside distillation it gained nothing where it was measured. Usual are 0.01 and
    0.001."""

    lambda1: float = Field(0.0, ge=0)
    """Weight of squared interference with retained directions, relative to their strength."""
    lambda2: float = Field(0.0, ge=0)
    """Weight of the squared size of the update outside of them."""


class DistillationConfig(Table):
    """Distillation from the model as it was at the start of the task (deal, lwf)."""

    weight: float = Field(1.0, ge=0)
    """Of what each earlier task chooses between, the mean over tasks; of words, where a model is
    generating. 0: off."""
    future_weight: float = Field(0.25, ge=0)
    """Weight of what future tasks will choose between (deal): the experiment names their labels,
    and what the model can do without training is kept as well, from the first task on. 0: off."""


class EwcConfig(Table):
    """Elastic weight consolidation (ewc)."""

    weight: float = Field(100.0, ge=0)
    """Of half the squared change of every factor entry, times its Fisher information. Of 10, 100
    and 1000 it is the best on the stream that settings were chosen on."""


class PrototypeConfig(Table):
    """Labels answered by class means of the frozen model's embeddings (prototype; deal, where
    enabled)."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """Whether ``deal`` answers with class means beside the adapted model, from sums that are taken
    in one more round of a task, under masks and with noise; auto: where three clients or more take
    part, and no answers that are texts are learnt beside labels all at once."""
    layers: int = Field(4, ge=1)
    """Of how many of the model's last layers the embeddings are made, neighbours averaged in pairs;
    of all, where it has no more."""
    directions: int = Field(256, ge=0, le=1024)
    """Public directions in which records are added up: the strongest ones of public texts
    (``data.public_path``). In more directions a sum tells more of a record that is in it; 0: all
    that an embedding has, which no site gives (for comparisons in simulations)."""
    noise_multiplier: float = Field(0.61, ge=0)
    """Noise of a class sum over sites, in units of what one record adds at most, where no mechanism
    says how much: 0.61 is epsilon 7.9 at delta 1e-5 for a record and one task, against the server
    and ``privacy.colluding`` of the sites. A site gives none with less."""


class MethodConfig(Table):
    """The continual-learning method."""

    name: str = "deal"
    """``deal``, or a baseline: ``sequential``, ``lwf``, ``ewc``, ``olora``, ``slao``, ``replay``,
    ``deal-reference``; without training, ``prototype``, ``linear-probe``."""
    retention: RetentionConfig = RetentionConfig()
    update: UpdateConfig = UpdateConfig()
    distillation: DistillationConfig = DistillationConfig()
    ewc: EwcConfig = EwcConfig()
    prototype: PrototypeConfig = PrototypeConfig()


class AggregationConfig(Table):
    """How client updates become one adapter."""

    rule: str = "fedit"
    """``fedit`` (mean of each factor, inexact); ``ffa`` (``lora_B`` alone, exact); ``fedex`` or
    ``flora`` (both factors, exact). An ``adapter.kind`` of few numbers has its own."""
    secure: bool = False
    """Whether the server sees the sum over sites alone: each masks its update, and the masks cancel
    (rules ``fedit`` and ``ffa``). Without a mechanism all clients must be told alike: no orders of
    their own, no ``ewc``, ``replay`` or ``deal-reference``."""
    min_cohort: int = Field(3, ge=3)
    """Fewest sites in a secure sum; a round with fewer ends without one. A site's own policy may
    ask for more: it takes part where this is as large."""
    robust: str = "none"
    """Protection against bad updates, before the rule: ``none`` or ``cosine-norm``."""


class WireConfig(Table):
    """How adapters travel."""

    dtype: Literal["float32", "int8"] = "float32"
    """``float32`` (exact) or ``int8`` (with error feedback at the client). Class sums of embeddings
    and their label heads travel in int8 as well, else in float32; sums and heads of
    ``linear-probe`` always in float32."""


class TrainConfig(Table):
    """The local optimiser."""

    learning_rate: float = Field(2e-3, gt=0, le=100)
    """Of AdamW, constant; its state starts anew in every round. At most 1 where the client takes
    the steps."""
    step: Literal["client", "server"] = "client"
    """Who takes the steps: each ``client`` several in a round, or the ``server`` one, of gradient
    descent, on the sum of all clients' clipped gradients (with ``aggregation.secure``). Then a
    round is one step, and ``federation.rounds`` says how many a task has."""
    batch_size: int = Field(16, ge=1)
    """Examples in a step; groups, where ``privacy.unit_column`` names some (record)."""
    max_length: int = Field(128, ge=8)
    """Tokens kept of a text."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen model and its activations; auto: bfloat16 where the hardware multiplies it
    fast (CUDA, processors with AMX or AVX-512 BF16), float32 elsewhere. Adapters are always
    float32."""

    @model_validator(mode="after")
    def _steps_that_stay_small(self) -> Self:
        if self.step == "client" and self.learning_rate > 1:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is more than a step of AdamW may move an "
                "entry, 1; lower it"
            )
        return self


def _computes_exactly(device: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", device):
        reason = " (Apple's GPU has no float64, in which sums are added)" if device == "mps" else ""
        raise ValueError(f"'{device}' is no device: set auto, cpu, cuda or cuda:N{reason}")
    return device


Device = Annotated[str, AfterValidator(_computes_exactly)]
"""``auto`` (CUDA where there is any), ``cpu``, ``cuda`` or ``cuda:N``."""


def show_device(device: str) -> None:
    """Show torch only this device, before torch looks for one."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number


class RunConfig(Table):
    """The run itself."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Draws the division of the data, the clients of a round, initial adapters and the order of
    examples; the noise of a privacy mechanism in simulations alone."""
    engine: str = "inprocess"
    """``inprocess``, or Flower's: ``flower`` (simulation) or ``loopback`` (a SuperLink, and a
    SuperNode for every client); ``deployment`` is what ``deal submit`` sets."""
    device: Device = "auto"
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA where there is any. A site decides on its
    own."""
    threads: int = Field(0, ge=0)
    """Torch threads of a process that trains; 0: all cores, divided among the workers."""
    workers: int = Field(0, ge=0)
    """Processes that train clients at the same time; 0: one per GPU, or, without a GPU, as many
    as there are cores for their threads."""
    out: str = ""
    """Run folder; empty: ``runs/NAME-seedN``."""
    resume: bool = False
    """Continue the run in ``out`` from its checkpoint."""
    track: Literal["none", "tensorboard"] = "none"
    """A tracker that follows the run, in the run folder (``tracking/``); it needs the extra of its
    name."""


class Experiment(Table):
    """A whole experiment; ``Experiment()`` runs on what is embedded."""

    description: str = ""
    """One line for people: `deal ls` shows it, nothing else reads it."""
    plugins: tuple[str, ...] = ()
    """Python files of one's own, relative to the experiment's: they add methods, rules, models or
    sources to the registries (simulations with engine ``inprocess``)."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    federation: FederationConfig = FederationConfig()
    method: MethodConfig = MethodConfig()
    aggregation: AggregationConfig = AggregationConfig()
    wire: WireConfig = WireConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    def changed(self, **tables: Mapping[str, Any]) -> Experiment:
        """Return it with other values of some keys, given table by table and not checked."""
        new = {name: getattr(self, name).model_copy(update=keys) for name, keys in tables.items()}
        return self.model_copy(update=new)


def may_take_sums(experiment: Experiment) -> bool:
    """Return False only where clients give no sums over records; torch is not loaded."""
    method = experiment.method
    if method.name == "deal":
        return method.prototype.enabled != "off"
    return method.name in {"prototype", "linear-probe"}


def at_server(experiment: Experiment) -> bool:
    """Return whether the server takes the steps, on sums of gradients."""
    return experiment.train.step == "server"


def fewest_in_sum(experiment: Experiment) -> int:
    """Return how many clients a sum needs for its noise to be whole: all but those that may fail;
    0 where the server takes no steps."""
    if not at_server(experiment):
        return 0
    return experiment.federation.clients - experiment.privacy.dropouts


def counts_in_sum(experiment: Experiment) -> bool:
    """Return whether counts of right answers leave in a secure sum alone."""
    return experiment.aggregation.secure and experiment.privacy.metrics == "summed"
