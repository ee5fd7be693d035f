"""Two LoRA adapters on one frozen base model: attach, read, write, switch.

PEFT holds the layers; here are the few verbs the rest of the project needs. Layer names are
those of the base model (``encoder.layer.0.attention.self.query``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from deal_core.adapters import Adapter, LoraFactors, zero_adapter
from deal_core.config import AdapterConfig
from deal_core.errors import UserError
from deal_core.payload import PREFIX

CURRENT = "current"
RETAINED = "retained"
RESIDUAL = "residual"
"""What an exact aggregation rule could not fit into the current adapter; often absent."""


def attach(base: nn.Module, config: AdapterConfig, task_type: TaskType) -> PeftModel:
    """Freeze ``base`` and add a retained and a residual (scaling 1) and a current adapter, zero.

    Raises:
        UserError: ``adapter.target_modules`` names no linear layer of the model.
    """
    try:
        model = _with_adapters(base, config, task_type)
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None
    shapes = {
        name: (layer.out_features, layer.in_features) for name, layer in lora_layers(model).items()
    }
    write(model, RETAINED, zero_adapter(shapes, config.retained_rank))
    write(model, RESIDUAL, zero_adapter(shapes, 1))
    write(model, CURRENT, zero_adapter(shapes, config.rank, config.lora_alpha / config.rank))
    activate(model, [CURRENT])
    set_trainable(model, frozenset({"lora_A", "lora_B"}))
    return model


def _with_adapters(base: nn.Module, config: AdapterConfig, task_type: TaskType) -> PeftModel:
    targets = list(config.target_modules) or None
    ranks = {RETAINED: config.retained_rank, RESIDUAL: 1, CURRENT: config.rank}
    configs = {
        name: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type=task_type)
        for name, rank in ranks.items()
    }
    with warnings.catch_warnings():
        # Theirs to settle: PEFT uses a name that transformers deprecates, and tells that it
        # corrected fan_in_fan_out for Conv1D layers.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False.*", UserWarning)
        model = get_peft_model(base, configs[RETAINED], adapter_name=RETAINED)
        assert isinstance(model, PeftModel)
        for name in (RESIDUAL, CURRENT):
            model.add_adapter(name, configs[name])
    return model


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return layer name to PEFT layer (too loosely typed to be more than Any), in order."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def read(model: nn.Module, name: str) -> Adapter:
    """Copy one adapter (``CURRENT`` or ``RETAINED``) out of the model, to the CPU."""
    layers = lora_layers(model)
    return Adapter(
        {
            key: LoraFactors(
                layer.lora_A[name].weight.detach().float().cpu().clone(),
                layer.lora_B[name].weight.detach().float().cpu().clone(),
            )
            for key, layer in layers.items()
        },
        next(iter(layers.values())).scaling[name],
    )


def write(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Copy one adapter into the model; its rank may differ from the one before.

    Raises:
        ValueError: the adapter's layers are not the model's.
    """
    layers = lora_layers(model)
    if layers.keys() != adapter.layers.keys():
        raise ValueError("the adapter was made for other layers than the model's")
    for key, factors in adapter.layers.items():
        layer = layers[key]
        _assign(layer.lora_A[name].weight, factors.A)
        _assign(layer.lora_B[name].weight, factors.B)
        layer.r[name] = factors.A.shape[0]
        layer.scaling[name] = adapter.scaling


def activate(model: PeftModel, names: list[str]) -> None:
    """Let exactly these adapters take part in the forward pass (an idle one costs time)."""
    tuner: Any = model.base_model
    if list(tuner.active_adapters) != names:
        tuner.set_adapter(names)


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.detach().to(parameter.device, parameter.dtype).clone()
    parameter.grad = None


def set_trainable(model: nn.Module, factors: frozenset[str]) -> list[nn.Parameter]:
    """Let exactly these factors of the current adapter learn; return their parameters.

    Args:
        model: a model made by :func:`attach`.
        factors: a subset of ``{"lora_A", "lora_B"}``.
    """
    model.requires_grad_(False)
    chosen: list[nn.Parameter] = []
    for layer in lora_layers(model).values():
        for factor in sorted(factors):
            weight = getattr(layer, factor)[CURRENT].weight
            weight.requires_grad_(True)
            chosen.append(weight)
    return chosen


@contextmanager
def without_current(model: nn.Module) -> Iterator[None]:
    """Within the block the model is what it was at the start of the task: ``W0 + retained``."""
    with _silenced(model, (CURRENT, RESIDUAL)):
        yield


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block all adapters are off: the frozen base model, without gradients."""
    with _silenced(model, (CURRENT, RESIDUAL, RETAINED)), torch.no_grad():
        yield


@contextmanager
def _silenced(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Scale these adapters by 0, and back; unlike switching them off, gradients stay as set."""
    layers = list(lora_layers(model).values())
    before = [{name: layer.scaling[name] for name in names} for layer in layers]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(names, 0.0))
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
