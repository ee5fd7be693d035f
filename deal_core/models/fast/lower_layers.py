"""The layers below the first adapted one: they never change, so a text passes them once.

What they make of a prompt serves epochs, rounds, teacher and evaluation.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from deal_core.lora.attach import lora_layers
from deal_core.models.fast.prompt_forest import PromptForest, PromptRow, decode, plant, states_after

CACHED_BYTES = 2**29
"""What is kept; beyond, what was used longest ago goes."""
TOKENS_PER_PASS = 4096
"""Of prompts that are new, so many in one pass."""


def first_adapted(module: nn.Module) -> tuple[list[nn.Module], int]:
    """Return the model's layers, and how many of them lie below the first adapted one; none where
    something is adapted that is no part of a layer, or is not known to lie behind them all."""
    names = list(lora_layers(module))
    base = cast(Any, module).get_base_model()
    stacks = [
        (f"{name}.", list(child))
        for name, child in base.named_modules()
        if isinstance(child, nn.ModuleList) and any(n.startswith(f"{name}.") for n in names)
    ]
    if len(stacks) != 1:
        return [], 0
    prefix, layers = stacks[0]
    if not all(name.startswith(prefix) for name in names):
        return [], 0
    return layers, min(int(name.removeprefix(prefix).split(".")[0]) for name in names)


@dataclass
class LowerLayers:
    """What the layers below the first adapted one make of prompts, by prompt."""

    decoder: Any
    """The model without its head."""
    layers: list[nn.Module]
    below: int
    """How many lie below the first adapted one."""
    keeps: bool = True
    """Whether what they make is kept from pass to pass. Where single records are protected it is
    not: memory would depend on the records before, and no rehearsal could tell it."""
    _known: OrderedDict[PromptRow, Tensor] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def states(self, forest: PromptForest) -> Tensor:
        """Return what arrives at the first adapted layer, ``(1, tokens, hidden)``."""
        try:
            self._learn(forest.rows)
            parts: list[Tensor] = []
            head: tuple[int, ...] = ()
            for row in forest.rows:
                if row.head and row.head != head:
                    parts.append(self._get(PromptRow(row.head, ())))
                head = row.head
                parts.append(self._get(row))
            return torch.cat(parts)[None]
        finally:
            if not self.keeps:
                self._known.clear()
                self._bytes = 0

    def _get(self, row: PromptRow) -> Tensor:
        self._known.move_to_end(row)
        return self._known[row]

    def _learn(self, rows: Sequence[PromptRow]) -> None:
        """Pass those that are not known through the layers. What prompts begin with has a pass of
        its own: many texts use it, and no text may leave its rounding in it."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._known]
        for head in dict.fromkeys(row.head for row in rows if row.head):
            if (alone := PromptRow(head, ())) not in self._known:
                self._pass([alone])
        part: list[PromptRow] = []
        tokens = 0
        for row in sorted(missing, key=lambda row: row.below):
            if part and tokens + row.below > TOKENS_PER_PASS:
                self._pass(part)
                part, tokens = [], 0
            part.append(row)
            tokens += row.below
        if part:
            self._pass(part)
        self._forget({*rows, *(PromptRow(row.head, ()) for row in rows)})

    def _pass(self, rows: Sequence[PromptRow]) -> None:
        forest, _ = plant(rows)
        with torch.no_grad():
            last = self.layers[self.below - 1]
            states = states_after(last, lambda: decode(self.decoder, forest))[0]
        for row, start in zip(forest.rows, forest.starts, strict=True):
            first = start if row.below else start - len(row.head)  # a head alone
            kept = states[first : start + row.below].clone()
            self._known[row] = kept
            self._bytes += kept.nbytes

    def _forget(self, needed: set[PromptRow]) -> None:
        while self._bytes > CACHED_BYTES:
            oldest = next(iter(self._known))
            if oldest in needed:
                return
            self._bytes -= self._known.pop(oldest).nbytes

    @contextmanager
    def replaced(self, states: Tensor) -> Iterator[None]:
        """Within the block the layers below hand on what they get, and the first adapted one gets
        these states."""

        def enter(
            module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if arguments:
                return (states, *arguments[1:]), named
            return arguments, {**named, "hidden_states": states}

        skipped = self.layers[: self.below]
        for layer in skipped:
            layer.forward = _hand_on
        handle = self.layers[self.below].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for layer in skipped:
                del layer.forward


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
