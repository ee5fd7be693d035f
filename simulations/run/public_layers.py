"""``deal layers``: where a model would move for a stream's tasks, as far as everybody may know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from deal_core.config.experiment import Experiment
from deal_core.data import open_source, public_labels
from deal_core.errors import UserError
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import read
from deal_core.lora.core import core_size
from deal_core.lora.state import State
from deal_core.models import LanguageModel, load_model
from deal_core.models.linear_layers import linear_layers
from deal_core.training.public_gradients import public_gradients
from simulations.output.console import print_line
from simulations.output.markdown import TextTable
from simulations.output.terminal import NARROW, text_table
from simulations.output.toml import toml_value
from simulations.run.experiment import Request, load_experiment

SHOWN = 20
"""Layers that are printed."""


@dataclass(frozen=True)
class PublicLayer:
    """One linear layer.

    Attributes:
        name: the shortest that means this layer alone, for ``adapter.target_modules``.
        share: of all squares of the model's public gradients, what a core of the experiment's rank
            could take hold of in this layer, 0 to 1; a mean over tasks.
        numbers: that such a core learns.
    """

    name: str
    share: float
    numbers: int


def public_layers(experiment: Experiment) -> list[PublicLayer]:
    """Return the model's linear layers, the largest share first. No row of data is used where the
    experiment names its labels; of others it is their labels alone.

    Raises:
        UserError: unknown names, data that cannot be read, or no task that has labels.
    """
    names = linear_layers(experiment.model)
    size = _directions(experiment)
    model = _on_all_layers(experiment, tuple(names))
    shares: dict[str, list[float]] = {}
    for task in open_source(experiment.data).task_names():
        labels = public_labels(experiment.data, task)
        if labels:
            words = experiment.data.instructions.get(task, "")
            for name, share in core_shares(_gradients(model, labels, words), size).items():
                shares.setdefault(name, []).append(share)
    if not shares:
        raise UserError("no task has labels: of answers that are texts nothing is public")
    found = [
        PublicLayer(names[name], sum(each) / len(each), size**2) for name, each in shares.items()
    ]
    return sorted(found, key=lambda layer: -layer.share)


def _directions(experiment: Experiment) -> int:
    """Of a core, one at least."""
    return max(1, core_size(experiment.adapter.rank))


def core_shares(gradients: Mapping[str, Tensor], size: int) -> dict[str, float]:
    """Return layer name to the sum of its ``size`` largest squared singular values, as a share of
    the squares of all gradients: how much of a first step a core of ``size`` directions can take.

    Args:
        gradients: layer name to ``(d_out, d_in)``.
        size: of the core.
    """
    total = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    return {
        name: float(_squares(gradient)[-size:].sum()) / total
        for name, gradient in gradients.items()
    }


def print_layers(request: Request, take: int, console: Console) -> None:
    """Print the layers, and the table that puts cores on the best ``take`` of them.

    Raises:
        UserError: see :func:`public_layers`.
    """
    experiment = load_experiment(request)
    layers, size = public_layers(experiment), _directions(experiment)
    rows = tuple(
        (layer.name, f"{100 * layer.share:.1f}", str(layer.numbers)) for layer in layers[:SHOWN]
    )
    table = TextTable(("layer", "share of the gradient, %", "numbers"), (False, True, True), rows)
    console.print(text_table(table), width=min(NARROW, console.width))
    if len(layers) > SHOWN:
        print_line(console, f"and {len(layers) - SHOWN} more with less")
    names = toml_value([layer.name for layer in layers[:take]])
    for line in ("[adapter]", 'kind = "core"', f"rank = {2 * size}", f"target_modules = {names}"):
        print_line(console, line)


def _squares(gradient: Tensor) -> Tensor:
    """Return the squared singular values, rising."""
    rows = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    squares: Tensor = torch.linalg.eigvalsh(rows.double() @ rows.double().T)
    return squares


def _on_all_layers(experiment: Experiment, names: tuple[str, ...]) -> LanguageModel:
    """Return the model with an adapter that is zero on each of these layers, as far as
    ``adapter.first_layer`` lets it."""
    changed = {"kind": "lora", "rank": 1, "client_ranks": (), "target_modules": names}
    adapter = experiment.adapter.model_copy(update=changed)
    return load_model(experiment.model, adapter, experiment.train.max_length)


def _gradients(model: LanguageModel, labels: tuple[str, ...], words: str) -> dict[str, Tensor]:
    nothing = zero_adapter(read(model.module).shapes, 1)
    return public_gradients(model, State(nothing, nothing), labels, words)
