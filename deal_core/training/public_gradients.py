"""Where a model would move for a task, from what everybody knows of it: the names of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deal_core.lora.attach import lora_layers, set_trainable
from deal_core.lora.state import State
from deal_core.models import LanguageModel
from deal_core.training.label_texts import label_texts
from deal_core.training.loop import load_state


def public_gradients(
    model: LanguageModel, state: State, labels: Sequence[str], instruction: str = ""
) -> dict[str, Tensor]:
    """Return layer name to the gradient of its whole weight, ``(d_out, d_in)``, float32, of the
    loss of the names of labels, each asked about as a text and answered by itself.

    Args:
        model: of any family; holds the state afterwards.
        state: the model as it is.
        labels: of the task.
        instruction: what its prompt asks for.
    """
    load_state(model, state)
    set_trainable(model.module, frozenset({"lora_A", "lora_B"}))
    data = label_texts(model, labels, instruction)
    layers = lora_layers(model.module)
    sums: dict[str, Tensor] = {}
    hooks = [layer.register_forward_hook(_watching(name, sums)) for name, layer in layers.items()]
    try:
        for item in data:
            model.forward_train([item], labels, ()).example_losses.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            for factor in layer.parameters():
                factor.grad = None
    return sums


def _watching(name: str, sums: dict[str, Tensor]) -> Any:
    """A forward hook that adds the outer product of a layer's inputs and its outputs' gradients."""

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()

        def add(gradient: Tensor) -> None:
            product = gradient.reshape(-1, gradient.shape[-1]).float().T @ rows
            sums[name] = sums[name] + product.cpu() if name in sums else product.cpu()

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
