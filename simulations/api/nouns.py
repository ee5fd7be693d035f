"""What a program says of a federation: its method, its protection, and the model that it passes."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Any, Literal

import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from deal_core.config.experiment import Experiment
from deal_core.config.privacy import PrivacyConfig
from deal_core.data.tags import tags_of
from deal_core.errors import UserError
from deal_core.methods import resolve_auto
from deal_core.models import FAMILIES
from deal_core.models.encoder import output_of
from deal_core.models.loading import GivenModel, Loss, Predict, copy_of, given
from deal_core.privacy.policy import Policy, default_delta

OWN_LOSS = "own-loss"
READS_SEVERAL = "its loss may read several records at once, or keep some; leave loss= out"


@dataclass(frozen=True)
class Deal:
    """The method DEAL and its parts; the settings of ``method`` say more.

    >>> Deal(distillation=0.0).settings["method.distillation.weight"]
    0.0
    """

    retention: str = "svd"
    """Filter of the singular values of all that was learnt: ``svd``, ``wavelet``, ``none``."""
    distillation: float = 1.0
    """Weight of distillation over labels of earlier tasks; 0: off."""
    future: float = 0.25
    """The same over labels of tasks to come."""
    class_means: Literal["auto", "on", "off"] = "auto"
    """Whether class means answer beside the model; auto: from three clients on."""

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted keys of an experiment to values."""
        return {
            "method.name": "deal",
            "method.retention.filter": self.retention,
            "method.distillation.weight": self.distillation,
            "method.distillation.future_weight": self.future,
            "method.prototype.enabled": self.class_means,
        }


@dataclass(frozen=True)
class RecordDP:
    """Differential privacy of every record of a client: DP-SGD, a ledger, a budget.

    At a strategy it is what the server asks; at a client, the least that it demands.

    >>> RecordDP(epsilon=8, delta=1e-5).settings["privacy.target_epsilon"]
    8.0
    """

    epsilon: float = 8.0
    """Budget of a record, over all that its client's ledger holds."""
    delta: float = 0.0
    """Probability that the budget says nothing; 0: by the number of records."""
    max_grad_norm: float = 1.0
    """Clipping bound of an example's gradient."""

    def __post_init__(self) -> None:
        above = 0 < self.epsilon < inf and 0 < self.max_grad_norm < inf
        if not (above and 0 <= self.delta < 1):
            raise UserError(
                f"{self}: epsilon and max_grad_norm should be above 0, and delta from 0 to below 1"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted keys of an experiment to values."""
        return {
            "privacy.mechanism": "record",
            "privacy.target_epsilon": float(self.epsilon),
            "privacy.target_delta": float(self.delta),
            "privacy.max_grad_norm": float(self.max_grad_norm),
        }

    def tightened(self, policy: Policy, units: int) -> Policy:
        """Return a policy that allows what both allow, of a site with so many records: a delta of
        its own takes the place of no smaller one, such as that which follows from their number."""
        limits = {"mechanism": "record", **self._least("max", policy)}
        if limits["max_delta"] and not policy.max_delta:
            limits["max_delta"] = min(limits["max_delta"], default_delta(units))
        return policy.model_copy(update=limits)

    def within(self, privacy: PrivacyConfig) -> PrivacyConfig:
        """Return what is asked, with no more than this budget."""
        return privacy.model_copy(update=self._least("target", privacy))

    def _least(self, prefix: str, table: Policy | PrivacyConfig) -> dict[str, Any]:
        """Return the smaller of both budgets; 0 is no limit."""
        found = dict[str, Any]()
        for name, own in (("epsilon", self.epsilon), ("delta", self.delta)):
            limits = [each for each in (own, getattr(table, f"{prefix}_{name}")) if each]
            found[f"{prefix}_{name}"] = float(min(limits, default=0.0))
        return found


def method_settings(method: Deal | str | None) -> dict[str, Any]:
    """Return dotted keys of an experiment to values; of a baseline its name."""
    if method is None:
        return {}
    return method.settings if isinstance(method, Deal) else {"method.name": method}


def read_model(
    model: Any, tokenizer: Any, loss: Loss | None = None, predict: Predict | None = None
) -> GivenModel:
    """Return what a program passes: a ``PeftModel``, whose adapter is taken as it is laid out, or a
    ``PreTrainedModel``.

    Raises:
        UserError: it is neither, no family fits, one function is missing, or PEFT settings that
            cannot be followed.
    """
    adapter: dict[str, Any] = {}
    base = model
    if isinstance(model, PeftModel):
        adapter = _adapter_of(model)
        base = copy_of(model).unload()
    if not isinstance(base, transformers.PreTrainedModel):
        raise UserError(f"model is a {type(model).__name__}; pass a PeftModel or a PreTrainedModel")
    if (loss is None) != (predict is None):
        raise UserError("loss and predict belong together; pass both, or neither")
    if loss is not None and predict is not None:
        return GivenModel(base, tokenizer, OWN_LOSS, (loss, predict), adapter)
    return GivenModel(base, tokenizer, _family_of(base), None, adapter)


def _family_of(base: Any) -> str:
    for name, family in FAMILIES.items():
        kinds = getattr(transformers, family.auto_class)._model_mapping.get(type(base.config), ())
        if name != OWN_LOSS and type(base) in (kinds if isinstance(kinds, tuple) else (kinds,)):
            return name
    raise UserError(
        f"model: no family trains a {type(base).__name__}; load it with one of "
        f"{', '.join(dict.fromkeys(family.auto_class for family in FAMILIES.values()))}, or pass "
        "loss= and predict="
    )


UNREAD = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layer_replication")


def _adapter_of(model: Any) -> dict[str, Any]:
    config = model.active_peft_config
    if not isinstance(config, LoraConfig):
        raise UserError(f"model: its adapter is a {config.peft_type.value}; DEAL trains LoRA")
    odd = [key for key in UNREAD if getattr(config, key, None)]
    if odd or config.bias != "none":
        raise UserError(f"model: LoraConfig.{odd[0] if odd else 'bias'} is set; leave it out")
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    if any(up.weight.any() for layer in layers.values() for up in layer.lora_B.values()):
        raise UserError(
            "model: its adapter has learnt something already; pass model.merge_and_unload(), and "
            "a new adapter on it"
        )
    plain = model.get_base_model().named_modules()
    short = {name.rpartition(".")[2] for name in layers}
    alike = {n for n, m in plain if n.rpartition(".")[2] in short and "base_layer" not in n}
    targets: Iterable[str] = short if alike == set(layers) else layers
    return {
        "rank": config.r,
        "lora_alpha": float(config.lora_alpha),
        "target_modules": tuple(sorted(targets)),
    }


def require_possible(experiment: Experiment) -> None:
    """Check that the model that was passed can do what is asked of it.

    Raises:
        UserError: a part of the method, or of the protection, that it cannot; or labels that its
            head has no output for.
    """
    model, method = given(experiment.model.name), resolve_auto(experiment)
    if model.family in ("sequence-classification", "token-classification"):
        labels = [*chain.from_iterable(experiment.data.labels.values())]
        for label in tags_of(labels) if FAMILIES[model.family].tags else labels:
            output_of(label, getattr(model.base, "config").label2id)  # noqa: B009
    if model.family != OWN_LOSS:
        return
    weights = method.distillation.weight, method.distillation.future_weight
    parts = {
        f"privacy.mechanism 'record': {READS_SEVERAL}": experiment.privacy.mechanism != "none",
        "distillation: it gives no logits; set Deal(distillation=0, future=0)": method.name
        in ("deal", "lwf")
        and any(weights),
        "class means: it has no embedding; set Deal(class_means='off')": method.name == "deal"
        and method.prototype.enabled == "on",
        f"method '{method.name}': it has no embedding, or no logits; use 'deal' or "
        "'sequential'": method.name not in ("deal", "sequential", "lwf"),
    }
    for part, asked in parts.items():
        if asked:
            raise UserError(f"a model with a loss of its own cannot do {part}")
