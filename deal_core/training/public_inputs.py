"""What the layers of a model take in on texts that everybody knows: the names of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deal_core.lora.attach import lora_layers
from deal_core.lora.state import State
from deal_core.models import LanguageModel
from deal_core.training.label_texts import label_texts
from deal_core.training.loop import load_state


def public_inputs(
    model: LanguageModel, state: State, tasks: Sequence[tuple[Sequence[str], str]]
) -> dict[str, Tensor]:
    """Return layer name to ``sum x x^T`` over its inputs, ``(d_in, d_in)``, float64, when the names
    of labels are asked about as texts.

    Args:
        model: of any family; holds the state afterwards.
        state: the model as it is.
        tasks: labels of each, and what its prompt asks for. One without labels gives nothing.
    """
    load_state(model, state)
    sums: dict[str, Tensor] = {}
    _read(model, tasks)  # vectors of names, by the frozen model, are made once: not while it counts
    hooks = [
        layer.register_forward_pre_hook(_watching(name, sums))
        for name, layer in lora_layers(model.module).items()
    ]
    try:
        _read(model, tasks)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _read(model: LanguageModel, tasks: Sequence[tuple[Sequence[str], str]]) -> None:
    with torch.no_grad():
        for labels, instruction in tasks:
            for item in label_texts(model, labels, instruction):
                model.forward_train([item], labels, ())


def _watching(name: str, sums: dict[str, Tensor]) -> Any:
    """A hook that adds the outer products of what comes in."""

    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        product = (rows.T @ rows).cpu()
        sums[name] = sums[name] + product if name in sums else product

    return hook
