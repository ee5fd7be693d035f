"""The current LoRA adapter on a frozen base model that holds everything else merged.

PEFT holds the adapter. What does not learn during a task, the retained adapter and the
residual, is added to the frozen weights once instead of being multiplied in every pass. Layer
names are those of the base model (``encoder.layer.0.attention.self.query``).
"""

import json
import operator
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deal_core.config.experiment import AdapterConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, split, stack, zero_adapter
from deal_core.lora.kinds import kind_of
from deal_core.lora.linear import (
    MergedStates,
    QuantizedStates,
    WeightState,
    adapted_forward,
    is_quantized,
)
from deal_core.lora.payload import PREFIX

CURRENT = "current"
"""PEFT's name of the adapter that learns."""
ATTENTION = re.compile("attn|attention", re.IGNORECASE)
QUERY_VALUE = re.compile("q|v|.*qkv", re.IGNORECASE)


def attach(base: nn.Module, config: AdapterConfig, task_type: TaskType) -> PeftModel:
    """Return ``base``, frozen (where it will stay: device and dtype), with a current adapter, zero.

    Raises:
        UserError: ``adapter.target_modules`` names no linear layer of the model, or one whose
            weight is that of the embeddings as well.
    """
    linear = linear_layers(base)  # before PEFT puts its own in their places
    try:
        model = _with_adapter(base, config, task_type)
    except UserError:
        raise
    except ValueError:
        has = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
        found = json.dumps(attention_layers(linear))
        cure = f": try {found}" if found != "[]" else ""
        raise UserError(
            f"adapter.target_modules: names no linear layers of this model, which has {has}{cure}"
        ) from None
    model.adapted_layers = layers = lora_layers(model)  # type: ignore[assignment]
    _require_own_weights(base, layers)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    for layer in layers.values():
        quantized = is_quantized(layer.base_layer)
        layer.weights = QuantizedStates(layer) if quantized else MergedStates(layer)
        layer.forward = partial(adapted_forward, layer, CURRENT)
    write(model, zero_adapter(shapes, config.rank, config.lora_alpha / config.rank))
    set_trainable(model, frozenset({"lora_A", "lora_B"}))
    return model


def _require_own_weights(base: Any, layers: Mapping[str, Any]) -> None:
    """Check that what is merged into a layer's weight changes that layer alone."""
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    shared = getattr(embeddings, "weight", None)
    for name, layer in layers.items():
        if shared is not None and layer.get_base_layer().weight is shared:
            raise UserError(
                f"adapter.target_modules: '{name.rpartition('.')[2]}' has the weight of the input "
                "embeddings in this model (tied), so an adapter would change both; leave it out"
            )


def _with_adapter(base: nn.Module, config: AdapterConfig, task_type: TaskType) -> PeftModel:
    kind = kind_of(config)
    kind.add_layers(base)
    modules = list(kind.target_modules or config.target_modules)
    known = getattr(getattr(base, "config", None), "model_type", "") in DEFAULTS
    if not modules and not known:
        modules = attention_layers(linear_layers(base))
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=modules or None,
        layers_to_transform=_adapted_layers(base, config.first_layer),
        task_type=task_type,
    )
    with quiet_peft():
        model = get_peft_model(base, lora, adapter_name=CURRENT)
    assert isinstance(model, PeftModel)
    return model


def linear_layers(base: nn.Module) -> list[str]:
    """Return the full names of the layers that PEFT can adapt."""
    return [n for n, layer in base.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]


def attention_layers(linear: Iterable[str]) -> list[str]:
    """Return the last parts of names of layers in attentions: of those that make queries and
    values; where no name tells, of all."""
    paths = [name.rpartition(".") for name in linear]
    own = dict.fromkeys(leaf for path, _, leaf in paths if ATTENTION.search(path))
    return [leaf for leaf in own if QUERY_VALUE.match(leaf)] or list(own)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out, while PEFT changes a model, warnings that are theirs to settle: it uses a name
    that transformers deprecates, and tells that it corrected ``fan_in_fan_out`` for ``Conv1D``
    layers. A tied layer is refused, not warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to .*", UserWarning)
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter.*", UserWarning)
        yield


def _adapted_layers(base: nn.Module, first: int) -> list[int] | None:
    """Return numbers of the layers from ``first`` on; None: all."""
    if not first:
        return None
    layers: int = getattr(base, "config").num_hidden_layers  # noqa: B009 - not every module has one
    if first >= layers:
        raise UserError(f"adapter.first_layer = {first}: the model has layers 0 to {layers - 1}")
    return list(range(first, layers))


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return layer name to PEFT layer (too loosely typed to be more than Any), in order."""
    known: dict[str, Any] | None = model.__dict__.get("adapted_layers")
    if known is not None:
        return known
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def read(model: nn.Module) -> Adapter:
    """Copy the current adapter out of the model, to the CPU."""
    layers = lora_layers(model)
    return Adapter(
        {
            key: LoraFactors(
                layer.lora_A[CURRENT].weight.detach().float().cpu().clone(),
                layer.lora_B[CURRENT].weight.detach().float().cpu().clone(),
            )
            for key, layer in layers.items()
        },
        next(iter(layers.values())).scaling[CURRENT],
    )


def write(model: nn.Module, adapter: Adapter) -> None:
    """Copy the current adapter into the model; its rank may differ from the one before.

    Raises:
        ValueError: the adapter's layers are not the model's.
    """
    layers = lora_layers(model)
    _require_layers(layers, adapter)
    for name, layer in layers.items():
        factors = adapter.layers[name]
        pairs = (layer.lora_A, factors.A), (layer.lora_B, factors.B)
        for parameter, value in ((own[CURRENT].weight, value) for own, value in pairs):
            parameter.data = value.detach().to(parameter.device, parameter.dtype).clone()
            parameter.grad = None
        layer.r[CURRENT] = factors.A.shape[0]
        layer.scaling[CURRENT] = adapter.scaling


def merge(
    model: nn.Module, retained: Adapter, residual: Adapter | None, num_reference_directions: int = 0
) -> None:
    """Put ``base``, ``base + retained`` and ``base + retained + residual`` in place; the last
    without the first ``num_reference_directions`` directions of ``retained``.

    The sums are made from the weights as they were loaded, so nothing drifts; for the adapters of
    the last call they are in place already.

    Raises:
        ValueError: an adapter's layers are not the model's.
    """
    wanted = retained, residual, num_reference_directions
    before = model.__dict__.pop("merged", None)
    if before is not None and all(map(operator.is_, before, wanted)):
        model.merged = before
        return
    start, now = stack([retained]), None
    if residual is not None or num_reference_directions:
        kept = split(retained, num_reference_directions)[1]
        # Summed before anything is rounded to the weight's type: the two may cancel.
        now = stack([kept] if residual is None else [kept, residual])
    layers = lora_layers(model)
    _require_layers(layers, start)
    for name, layer in layers.items():
        layer.weights.put(start.layers[name], None if now is None else now.layers[name])
    _select(model, "current")
    model.merged = wanted  # type: ignore[assignment]


def _require_layers(layers: dict[str, Any], adapter: Adapter) -> None:
    if layers.keys() != adapter.layers.keys():
        raise ValueError("the adapter was made for other layers than the model's")


def set_trainable(model: nn.Module, factors: frozenset[str]) -> list[nn.Parameter]:
    """Return the parameters of these ``factors`` (``lora_A``, ``lora_B``) of the current adapter;
    exactly they learn from now."""
    model.requires_grad_(False)
    chosen: list[nn.Parameter] = []
    for layer in lora_layers(model).values():
        for factor in sorted(factors):
            weight = getattr(layer, factor)[CURRENT].weight
            weight.requires_grad_(True)
            chosen.append(weight)
    return chosen


def learning_factors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return key to every factor that learns."""
    return {key: factor for key, factor in factors_in(module).items() if factor.requires_grad}


def factors_in(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the same for all factors of the current adapter, in the order of
    :func:`set_trainable`."""
    return {
        f"{PREFIX}{name}.{factor}.weight": getattr(layer, factor)[CURRENT].weight
        for name, layer in lora_layers(module).items()
        for factor in ("lora_A", "lora_B")
    }


@contextmanager
def at_task_start(model: nn.Module) -> Iterator[None]:
    """Within the block, without gradients, the model is what it was at the start of the task:
    ``base + retained``."""
    with torch.no_grad(), _frozen_alone(model, "task_start"):
        yield


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block, without gradients, the model is the frozen base model."""
    with torch.no_grad(), _frozen_alone(model, "pretrained"):
        yield


@contextmanager
def _frozen_alone(model: nn.Module, state: WeightState) -> Iterator[None]:
    """Scale the current adapter by 0, select a frozen state; and back."""
    layers = list(lora_layers(model).values())
    before = [layer.scaling[CURRENT] for layer in layers]
    for layer in layers:
        layer.scaling[CURRENT] = 0.0
    _select(model, state)
    try:
        yield
    finally:
        _select(model, "current")
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[CURRENT] = scaling


def _select(model: nn.Module, state: WeightState) -> None:
    for layer in lora_layers(model).values():
        layer.weights.select(state)


Gradient = Mapping[str, Tensor]
"""Name of what learns to its gradient; a name may be missing: zero."""


class ExampleLosses(Protocol):
    """What is differentiated: an objective, as far as it reads data."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates."""


def example_gradient(module: nn.Module, objective: ExampleLosses, example: int) -> Gradient:
    """Return the gradient of one example: all of its loss, whichever way that reads a factor.
    Gradients of the factors stay as they are. The pass is its own: who else is in a pass decides
    how its numbers are rounded, and a model can be made so that this is what it answers with."""
    factors = learning_factors(module)
    loss = objective.example_losses([example]).sum()
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return {key: own for key, own in zip(factors, found, strict=True) if own is not None}
