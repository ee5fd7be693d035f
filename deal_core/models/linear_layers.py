"""The linear layers that an adapter can stand on, and the shortest names that mean one each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from deal_core.config.experiment import ModelConfig
from deal_core.errors import choose
from deal_core.models import FAMILIES


def linear_layers(model: ModelConfig) -> dict[str, str]:
    """Return layer name to the shortest end of it that no other module has, which is what
    ``adapter.target_modules`` takes; no weights are read. The layer that gives a word's logits is
    left out: it is the vocabulary's vectors in most models.

    Raises:
        UserError: unknown family or name.
    """
    module = choose("model.family", model.family, FAMILIES).skeleton(model)
    words = module.get_output_embeddings()
    names = [name for name, _ in module.named_modules() if name]
    return {
        name: shortest_end(name, names)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not words
    }


def shortest_end(name: str, names: Sequence[str]) -> str:
    """Return the fewest last parts of ``name`` that no other name ends with."""
    parts = name.split(".")
    others = [f".{other}" for other in names if other != name]
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other.endswith(f".{end}") for other in others):
            return end
    return name
