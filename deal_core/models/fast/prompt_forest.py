"""How prompts lie in one row of tokens, so that nothing is computed twice or for padding.

A tree is what some prompts begin with, once; below it a body for each prompt; below a body its
branches, answers among which one is chosen. A token sees what is above it and what stands before it
in its own part, and nothing else: so every prompt and every answer is read as if it were alone. A
forest is several trees end to end.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

ALIKE = 1.15
"""Padded cells over tokens up to which bodies are attended to together."""
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PromptRow:
    """One prompt, and what follows it."""

    head: Tokens
    """What it has in common with others."""
    body: Tokens
    """What follows, and for training the answer's tokens too."""
    branches: tuple[Tokens, ...] = ()
    """Answers to score, each without its last token, of which nothing is predicted."""

    @property
    def below(self) -> int:
        """Tokens of the body and its branches."""
        return len(self.body) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Bodies:
    """Bodies of one tree that are attended to together: a rectangle of cells, padded."""

    head: int
    """Tokens above them."""
    parts: tuple[tuple[int, ...], ...]
    """Of each, tokens of the body and of its branches."""

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [sum(part) for part in self.parts]

    @cached_property
    def _cells(self) -> Tensor:
        longest = max(self.lengths)
        real = torch.arange(longest)[None, :] < torch.tensor(self.lengths)[:, None]
        return real.flatten().nonzero().flatten()

    def apart(self, row: Tensor) -> Tensor:
        """``(tokens, d)`` to ``(bodies, longest, d)``; zero where there is no token."""
        bodies, longest = len(self.parts), max(self.lengths)
        cells = row.new_zeros(bodies * longest, row.shape[1])
        return cells.index_copy(0, self._cells.to(row.device), row).view(bodies, longest, -1)

    def together(self, cells: Tensor) -> Tensor:
        """Undo :meth:`apart`; what lies in cells without a token is dropped."""
        return cells.flatten(0, 1).index_select(0, self._cells.to(cells.device))

    def sees_within(self, window: int | None) -> Tensor:
        """Return :attr:`sees`, and nothing that lies ``window`` tokens or more behind."""
        if window is None or window >= self.head + max(self.lengths):
            return self.sees
        bodies, longest = len(self.parts), max(self.lengths)
        above = torch.arange(self.head).expand(bodies, -1)
        own = torch.zeros(bodies, longest, dtype=torch.long)
        for row, (body, *branches) in enumerate(self.parts):
            places = [*range(body)]
            for branch in branches:
                places += range(body, body + branch)
            own[row, : len(places)] = self.head + torch.tensor(places)
        keys = torch.cat([above, own], dim=1)
        near = own[:, :, None] - keys[:, None, :] < window
        return self.sees & near[:, None]

    @cached_property
    def sees(self) -> Tensor:
        """Which keys a cell's query sees, ``(bodies, 1, longest, head + longest)``; a cell without
        a token sees itself."""
        longest, bodies = max(self.lengths), len(self.parts)
        part = torch.full((bodies, longest), -1)
        for row, (lengths, total) in enumerate(zip(self.parts, self.lengths, strict=True)):
            numbers = torch.arange(len(lengths))
            part[row, :total] = numbers.repeat_interleave(torch.tensor(lengths))
        place = torch.arange(longest)
        before = place[:, None] >= place[None, :]
        related = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        own = (before & related) | torch.eye(longest, dtype=torch.bool)
        above = torch.ones(bodies, longest, self.head, dtype=torch.bool)
        return torch.cat([above, own], dim=2)[:, None]


@dataclass(frozen=True)
class PromptForest:
    """Rows, those with an equal head next to each other."""

    rows: tuple[PromptRow, ...]

    @cached_property
    def trees(self) -> tuple[tuple[int, tuple[Bodies, ...]], ...]:
        """Of each tree the tokens of its head, and its bodies, neighbours of about one length
        together."""
        return tuple(
            (len(rows[0].head), tuple(_alike_bodies(rows))) for rows in _by_head(self.rows)
        )

    @cached_property
    def _cells(self) -> list[tuple[int, int]]:
        """All tokens, each with its place in its own prompt and answer."""
        cells: list[tuple[int, int]] = []
        for rows in _by_head(self.rows):
            head = len(rows[0].head)
            cells += zip(rows[0].head, range(head), strict=True)
            for row in rows:
                end = head + len(row.body)
                cells += zip(row.body, range(head, end), strict=True)
                for branch in row.branches:
                    cells += zip(branch, range(end, end + len(branch)), strict=True)
        return cells

    @property
    def ids(self) -> Tensor:
        """All tokens, ``(1, tokens)``."""
        return torch.tensor([[token for token, _ in self._cells]])

    @property
    def positions(self) -> Tensor:
        """Place of every token in its own prompt and answer, ``(1, tokens)``."""
        return torch.tensor([[place for _, place in self._cells]])

    @cached_property
    def starts(self) -> list[int]:
        """Where in the forest the body of each row begins."""
        starts: list[int] = []
        place = 0
        for rows in _by_head(self.rows):
            place += len(rows[0].head)
            for row in rows:
                starts.append(place)
                place += row.below
        return starts

    def predicting(self, row: int, branch: int) -> list[int]:
        """Return the places in the forest that predict the tokens of a branch, last one included:
        the end of the body, and the branch itself."""
        lengths = [len(each) for each in self.rows[row].branches]
        body_end = self.starts[row] + len(self.rows[row].body)
        start = body_end + sum(lengths[:branch])
        return [body_end - 1, *range(start, start + lengths[branch])]


def plant(rows: Sequence[PromptRow]) -> tuple[PromptForest, list[int]]:
    """Return the forest of these rows, and the place of each of them among its rows; where there is
    one head, or none, the order stays."""
    heads = {head: n for n, head in enumerate(dict.fromkeys(row.head for row in rows))}
    order = sorted(range(len(rows)), key=lambda i: heads[rows[i].head])
    place = [0] * len(rows)
    for new, old in enumerate(order):
        place[old] = new
    return PromptForest(tuple(rows[i] for i in order)), place


def _by_head(rows: Sequence[PromptRow]) -> Iterator[list[PromptRow]]:
    """Neighbours with an equal head; a row without one is a tree of its own kind, with others."""
    tree: list[PromptRow] = []
    for row in rows:
        if tree and tree[-1].head != row.head:
            yield tree
            tree = []
        tree.append(row)
    if tree:
        yield tree


def _alike_bodies(rows: Sequence[PromptRow]) -> Iterator[Bodies]:
    parts = [(len(row.body), *map(len, row.branches)) for row in rows if row.below]
    group: list[tuple[int, ...]] = []
    for part in parts:
        lengths = [sum(each) for each in (*group, part)]
        if group and len(lengths) * max(lengths) > ALIKE * sum(lengths):
            yield Bodies(len(rows[0].head), tuple(group))
            group = []
        group.append(part)
    if group:
        yield Bodies(len(rows[0].head), tuple(group))


def decode(decoder: Any, forest: PromptForest) -> Tensor:
    """Return the last states of the tokens of a forest, ``(1, tokens, hidden)``."""
    return decode_layers(decoder, forest, 1)[0]


QUARTER = -1
"""In the place of a number of last layers: the one after a quarter of them, which tells best what
kind of text it is."""


class _Reached(Exception):
    """Carries the states of a layer; nothing above it is computed."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def states_after(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Return what a layer gives in a pass, ``run``, which ends there.

    Raises:
        RuntimeError: the pass leaves the layer out.
    """

    def stop(layer: nn.Module, _: Any, output: Any) -> None:
        raise _Reached(output if isinstance(output, Tensor) else output[0])

    hook = layer.register_forward_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise RuntimeError("a pass that leaves out a layer")


def quarter_layer(model: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Return the states after a quarter of a model's layers, rounded up, when it is ``run``."""
    stack = next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList))
    return states_after(stack[math.ceil(len(stack) / 4) - 1], run)


def decode_layers(decoder: Any, forest: PromptForest, layers: int) -> list[Tensor]:
    """Return the same of the last ``layers`` layers, the last one first, without keeping those of
    the others; QUARTER: of the one after a quarter of all."""
    device = next(decoder.parameters()).device

    def run() -> Tensor:
        states: Tensor = decoder(
            input_ids=forest.ids.to(device),
            position_ids=forest.positions.to(device),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            forest=forest,
            use_cache=False,
        ).last_hidden_state
        return states

    if layers == QUARTER:
        return [quarter_layer(decoder, run)]
    stack = next(list(m) for m in decoder.modules() if isinstance(m, nn.ModuleList))
    kept: dict[int, Tensor] = {}

    def keep(layer: nn.Module, _: Any, output: Any) -> None:
        kept[stack.index(layer)] = output if isinstance(output, Tensor) else output[0]

    wanted = stack[max(0, len(stack) - layers) : -1]  # what the last one gives is normed behind it
    hooks = [layer.register_forward_hook(keep) for layer in wanted]
    try:
        last = run()
    finally:
        for hook in hooks:
            hook.remove()
    return [last, *(kept[place] for place in sorted(kept, reverse=True))]
