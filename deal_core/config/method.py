"""The table ``[method]``: the continual-learning method and the keys of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deal_core.config.data import Table

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
    spectrum: values near the noise floor shrink, those below it vanish); ``none``: nothing is
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
