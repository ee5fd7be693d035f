"""The table ``[method]``: the continual-learning method and the keys of each."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deal_core.config.data import Table

OWN_MEMORY = frozenset({"deal-reference", "ewc", "replay"})
"""Names of methods whose clients keep something from task to task or round to round on their own
disks, and learn from it: more than a request and the task at hand."""
READ_BY = {
    "ewc": ("ewc",),
    "olora": ("olora",),
    "prototype": ("prototype", "deal"),
}
"""Table of settings to the methods that read it; one that is not named here is for all."""


def _require_higher(a: float, b: float) -> None:
    """The first of two powers is at least the second, in every penalty that has two."""
    if a < b:
        raise ValueError(f"a ({a:g}) must not be below b ({b:g}); raise a or lower b")


class RetentionConfig(Table):
    """Compression of all earlier tasks into the retained adapter (deal)."""

    enabled: bool = True
    """False: every task keeps training the same adapter, and nothing is compressed."""
    filter: str = "svd"
    """What is kept of the singular values of all that was learnt, at the end of every task: ``svd``
    (the largest, as they are; nothing measured beats it) or ``wavelet`` (heat kernels over the
    spectrum: values near the noise floor shrink, those below it vanish)."""


class UpdateConfig(Table):
    """Penalty on what an update does to retained knowledge (deal). Off: beside distillation
    it gained nothing where it was measured."""

    enabled: bool = False
    """Whether the penalty is added to the loss."""
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
        _require_higher(self.a, self.b)
        return self


class DistillationConfig(Table):
    """Distillation from the model as it was at the start of the task (deal, lwf)."""

    weight: float = Field(1.0, ge=0)
    """Of what earlier tasks choose between; 0 switches that off."""
    future_weight: float = Field(0.25, ge=0)
    """Weight of what future tasks will choose between (deal): the experiment names their labels,
    and what the model can do without training is kept as well, from the first task on. 0: off."""
    softmax: Literal["per-task", "joint"] = "per-task"
    """What the teacher chooses between: the labels of each task, as they are told apart when that
    task is tested (the mean over tasks), or of all earlier ones, and of all future ones, at once. A
    generating model's teacher chooses words, with ``weight`` where there is an earlier task."""
    prompts: Literal["auto", "current", "earlier"] = "auto"
    """How a generating model's teacher is asked: about each text with the prompt and the answer of
    the task at hand (``current``: the published form), or with the prompt of an earlier task, and
    gives an answer of its own (``earlier``). ``auto``: deal with ``earlier``, lwf with
    ``current``."""


class EwcConfig(Table):
    """Elastic weight consolidation (ewc)."""

    weight: float = Field(100.0, ge=0)
    """Of half the squared change of every factor entry, times its Fisher information. Of 10, 100
    and 1000 it is the best on the stream that settings were chosen on."""


class OLoraConfig(Table):
    """Orthogonality to the adapters of earlier tasks (olora)."""

    weight: float = Field(0.5, ge=0)
    """Of ``||A_earlier A^T||_F^2``, summed over layers."""


class PrototypeConfig(Table):
    """Labels answered by class means of the frozen model's embeddings (prototype; deal, where
    enabled)."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """Whether ``deal`` answers with class means beside the adapted model, from sums that are taken
    in one more round of a task, under masks and with noise; auto: where three clients or more take
    part, and no answers that are texts are learnt beside labels all at once."""
    names: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Weight of the scores of label names by the adapted model, beside those of class means (deal);
    auto: 0.5 of encoders, 1 of the likelihood of words."""
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
    ridge: float = Field(3.0, ge=1e-2)
    """Added to the variance of public texts in each direction, in whose metric the nearest class
    mean is the answer; in units of its mean. The larger, the more alike all directions count."""
    names_noise: float = Field(13.0, ge=0)
    """A label's name counts as so many records of it, for each standard deviation of the noise."""


class MethodConfig(Table):
    """The continual-learning method."""

    name: str = "deal"
    """``deal``, or a baseline: ``sequential``, ``lwf``, ``ewc``, ``olora``, ``slao``, ``replay``,
    ``deal-reference``; without training, ``prototype``, ``linear-probe``."""
    retention: RetentionConfig = RetentionConfig()
    update: UpdateConfig = UpdateConfig()
    distillation: DistillationConfig = DistillationConfig()
    ewc: EwcConfig = EwcConfig()
    olora: OLoraConfig = OLoraConfig()
    prototype: PrototypeConfig = PrototypeConfig()
