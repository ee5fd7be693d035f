"""Base models that a program passes as objects. Each has a name in the place of a folder's,
``given:CLASS-DIGEST``, equal for equal weights in every process, and is known while the process
lasts.

A run computes with a copy that has modules of its own, and shares the frozen numbers: neither
adapters nor attention of a run reach the object that was passed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deal_core.errors import UserError

GIVEN = "given:"
Loss = Callable[[nn.Module, list[Any]], torch.Tensor]
"""Model and examples to their losses, ``(batch,)``."""
Predict = Callable[[nn.Module, list[Any], list[str]], list[str]]
"""Model, examples and labels to the label of each."""


@dataclass(frozen=True)
class GivenModel:
    """What was passed."""

    base: nn.Module
    """Without an adapter."""
    tokenizer: Any
    family: str
    functions: tuple[Loss, Predict] | None = None
    """What trains and what answers, where no family knows how."""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the table ``adapter`` that came with it."""

    @cached_property
    def name(self) -> str:
        """What stands in the place of ``model.name``."""
        return f"{GIVEN}{type(self.base).__name__}-{_digest(self)}"


_known: dict[str, GivenModel] = {}


def keep(model: GivenModel) -> str:
    """Return the name under which a model is known from now on."""
    _known[model.name] = model
    return model.name


def given(name: str) -> GivenModel:
    """Return the model of this name.

    Raises:
        UserError: this process was passed none.
    """
    if name not in _known:
        raise UserError(
            f"model.name '{name}': a model that a program passes, and this one has passed no such "
            "model; pass the object (load_run(folder, model, tokenizer), DealClient)"
        )
    return _known[name]


def part_of(loader: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Return what ``loader`` would load: configuration, tokeniser, or a copy of the base model, its
    numbers in ``dtype``, with the attention that is asked for."""
    model = given(name)
    kind = getattr(loader, "__name__", "")
    if kind == "AutoConfig":
        return deepcopy(getattr(model.base, "config"))  # noqa: B009
    if kind == "AutoTokenizer":
        return model.tokenizer
    base: Any = copy_of(model.base)
    for number in base.parameters():
        if number.is_floating_point() and "dtype" in options:
            number.data = number.data.to(options["dtype"])
    if "attn_implementation" in options:
        base.set_attn_implementation(options["attn_implementation"])
    return base


def copy_of(model: nn.Module, place: str = "") -> Any:
    """Return a model with modules of its own and the same frozen numbers; on ``meta`` none."""
    memo: dict[int, Any] = {}
    for number in (*model.parameters(), *model.buffers()):
        same = number.detach().to(place) if place else number.detach()
        plain = type(number) is nn.Parameter
        memo[id(number)] = nn.Parameter(same, requires_grad=False) if plain else same
    return deepcopy(model, memo)


def _digest(model: GivenModel) -> str:
    functions = [getattr(each, "__qualname__", "") for each in model.functions or ()]
    hashed = hashlib.sha256(f"{model.family} {functions}".encode())
    for name, number in model.base.state_dict().items():
        hashed.update(f"{name} {tuple(number.shape)} {number.dtype}".encode())
        data = number.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(data.data)
    return hashed.hexdigest()[:12]
