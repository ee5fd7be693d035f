"""Baseline ``deal-reference``: DEAL as its authors' second code release reads the paper
(docs/deal-reference.md says what follows from it).

From the second task on, both factors of every layer are replaced for good by what a gate on their
spectrum and an MLP make of them (:class:`FactorMap`). The factors as the task began are fixed;
gates and MLPs alone learn, at a price (:func:`penalty`). The first task is plain LoRA. Sources:
DEAL, arXiv 2509.18942, eq. 8 to 12 and algorithm 1; what the paper leaves open is that release's:
one layer, ReLU on the spectrum, MLPs on the columns with ``max(128, min(n, 512))`` hidden units,
Kaiming weights and zero biases drawn anew in every task.

In the federation only factors travel. The server makes those that a task begins with, from MLPs
drawn from a seed; clients draw the same ones. A client goes on with its own maps, which it keeps on
its disk, and holds the difference to the average fixed in a round: ``received + map(now) - map(as
the round began)``. The factors of a task's end are the last average, not a map's. Computed in
float32, with one SVD a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deal_core.baselines.sequential import HeldStart
from deal_core.deal.interface import LocalTask, RoundState, Tensors
from deal_core.deal.objective import plain
from deal_core.lora.adapter import Adapter, fingerprint, is_nonzero
from deal_core.lora.attach import factors_in
from deal_core.lora.payload import PREFIX, factor_of
from deal_core.lora.state import State, by_key, start_of, with_factors
from deal_core.randomness import seeded
from deal_core.training.loop import Objective, Parametrization

SMALLEST = 1e-6
"""Of a squared width: a flat spectrum has no width of its own."""
NARROWEST, WIDEST = 128, 512
"""Of the hidden layer, which otherwise is as wide as a column is long."""


@dataclass(frozen=True)
class Constants:
    """Of the authors' second code release.

    Attributes:
        kernels: heat kernels of a gate.
        lambda1, a: weight and power of the sum over what the gates learn.
        lambda2, b: weight and power of the sum over what the MLPs learn.
        seed: draws the MLPs that a task begins with, at the server and at every client.
    """

    kernels: int = 4
    lambda1: float = 0.01
    lambda2: float = 0.001
    a: float = 5.0
    b: float = 2.0
    seed: int = 42


@dataclass(frozen=True)
class DealReference(HeldStart):
    """Attributes: the kernels, penalties and draw of ``config``."""

    config: Constants = Constants()

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Hold the factors as they are; the current ones are what fresh maps make of them."""
        held = super().begin_task(state, generator)
        if not is_nonzero(held.current):
            return held
        made = {k: m.factor() for k, m in fresh_maps(held.current, self.config).items()}
        return replace(held, current=with_factors(held.current, made))

    def objective(self, task: LocalTask) -> Objective:
        """Return ``CE + lambda1 sum |theta_1|^a + lambda2 sum |theta_2|^b``; plain in the first
        task."""
        losses = plain(task)
        start = start_of(task.state).current
        if not is_nonzero(start):
            return losses
        fresh = fresh_maps(start, self.config)
        basis = fingerprint(task.state.retained)
        maps = carried_maps(fresh, task.round_state, basis, task.model.device)
        return Mapped(losses, maps, self.config, task.round_state, basis)


def fresh_maps(start: Adapter, config: Constants) -> Mapping[str, FactorMap]:
    """Return the map of each factor as a task begins, by its key; on the CPU, so that server and
    clients make the same."""
    maps = {}
    for key, factor in by_key(start).items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        draw = seeded("factor map", config.seed, name)
        maps[key] = fresh_map(factor.cpu(), config.kernels, draw)
    return maps


def penalty(maps: Sequence[FactorMap], config: Constants) -> Tensor:
    """Return ``lambda1 sum |theta_1|^a + lambda2 sum |theta_2|^b`` over all maps, all entries."""

    def total(part: str, power: float) -> Tensor:
        learned = [t for m in maps for name, t in m.learned.items() if name.startswith(part)]
        return torch.stack([t.abs().pow(power).sum() for t in learned]).sum()

    return config.lambda1 * total("gate.", config.a) + config.lambda2 * total("mlp.", config.b)


@dataclass(frozen=True)
class Mapped:
    """Losses of the data, and a price of the maps."""

    objective: Objective
    """On the data; without a penalty of its own."""
    maps: Mapping[str, FactorMap]
    """Key of a factor to its map, as the round begins."""
    config: Constants
    round_state: RoundState | None
    """Keeps the maps for the client's next round, under ``basis``."""
    basis: str

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return the losses of the objective on the data, ``(batch,)``."""
        return self.objective.example_losses(batch)

    def penalty(self) -> Tensor | None:
        """Return the price of the maps that learn."""
        learning = [m for m in self.maps.values() if m.learned["gate.gains"].requires_grad]
        return penalty(learning, self.config) if learning else None

    def parametrization(self, module: nn.Module, trained: frozenset[str]) -> Parametrization:
        """Moves the maps of the ``trained`` factors; what they were is kept when it has done so."""
        keys = [key for key in self.maps if factor_of(key) in trained]
        factors = factors_in(module)
        return MapLearner(self, [factors[k] for k in keys], [self.maps[k] for k in keys])


class MapLearner(Parametrization):
    """``factor = received + map(now) - map(as the round began)``."""

    def __init__(
        self, mapped: Mapped, factors: Sequence[nn.Parameter], maps: Sequence[FactorMap]
    ) -> None:
        self.parameters = [t.requires_grad_() for m in maps for t in m.learned.values()]
        self._mapped, self._factors, self._maps = mapped, factors, maps
        self._made = [m.factor() for m in maps]
        with torch.no_grad():
            self._beside = [f - made for f, made in zip(factors, self._made, strict=True)]

    def before_step(self) -> None:
        """Take the factors' gradients back through the maps."""
        pairs = zip(self._made, self._factors, strict=True)
        reached = [(made, f.grad) for made, f in pairs if f.grad is not None]
        if reached:
            made, gradients = zip(*reached, strict=True)
            torch.autograd.backward(made, gradients)
        for factor in self._factors:
            factor.grad = None

    def after_step(self) -> None:
        """Make the factors anew, in place."""
        self._made = [m.factor() for m in self._maps]
        with torch.no_grad():
            for factor, made, beside in zip(self._factors, self._made, self._beside, strict=True):
                factor.copy_(made + beside)

    def finish(self) -> None:
        """Keep what the maps have learned."""
        kept = self._mapped.round_state
        if kept is not None:
            kept.save(self._mapped.basis, flat(self._mapped.maps))


def carried_maps(
    fresh: Mapping[str, FactorMap], round_state: RoundState | None, basis: str, device: torch.device
) -> dict[str, FactorMap]:
    """Return the maps as the client's latest round of the task left them; fresh ones where none
    did."""
    kept = round_state.load(basis) if round_state is not None else {}
    return {
        key: FactorMap(
            m.U.to(device),
            m.s.to(device),
            m.Vh.to(device),
            {n: kept.get(f"{key}/{n}", own).to(device, copy=True) for n, own in m.learned.items()},
        )
        for key, m in fresh.items()
    }


def flat(maps: Mapping[str, FactorMap]) -> Tensors:
    """Return all that the maps have learned, on the CPU."""
    return {
        f"{key}/{name}": value.detach().cpu()
        for key, m in maps.items()
        for name, value in m.learned.items()
    }


@dataclass(frozen=True, eq=False)
class FactorMap:
    """A LoRA factor made from the one that a task began with: ``Y' = MLP(U diag(gate(s)) V^T)``
    of ``Y = U diag(s) V^T``. ``Y`` is fixed for the task; gate and MLP learn.

    Attributes: the thin SVD of the fixed factor, ``(n, k)``, ``(k,)`` and ``(k, columns)``, and
    what learns, by ``gate.NAME`` and ``mlp.NAME``."""

    U: Tensor
    s: Tensor
    Vh: Tensor
    learned: Tensors

    def factor(self) -> Tensor:
        """Return ``Y'``, of the shape of ``Y``, with gradient to what learns."""
        return mlp((self.U * gate(self.s, self.learned)) @ self.Vh, self.learned)


def fresh_map(start: Tensor, kernels: int, generator: torch.Generator) -> FactorMap:
    """Return the map that a task begins with: an open gate, a drawn MLP on the columns of
    ``start``. The MLP is no identity, and what ``start`` knew is gone until it is learned again."""
    U, s, Vh = (part.float() for part in torch.linalg.svd(start.double(), full_matrices=False))
    return FactorMap(U, s, Vh, open_gate(s, kernels) | drawn_mlp(start.shape[0], generator))


def gate(s: Tensor, learned: Tensors) -> Tensor:
    """Return the singular values behind a learned gate, ``(directions,)``: heat kernels at several
    scales.

        ``s'_k = relu( s_k sum_j g_jk phi_j(s_k) phi_j(-s_k) )``,
        ``phi_j(s) = exp(-(s - c_j)^2 / (2 w_j))``,

    with centres ``c`` and squared widths ``w``, ``(kernels,)``, and gains ``g``, ``(kernels,
    directions)``. The two kernels multiply to ``exp(-(s^2 + c_j^2) / w_j)``: with gains of 1 the
    strongest directions pass least, and a flat spectrum, or one far above its own range, as zeros.
    Source: eq. 8 and 10.
    """
    widths = learned["gate.log_widths"].exp().clamp(min=SMALLEST)
    exponents = (s.square() + learned["gate.centres"].square()[:, None]) / widths[:, None]
    return torch.relu(s * (learned["gate.gains"] * torch.exp(-exponents)).sum(dim=0))


def open_gate(s: Tensor, kernels: int) -> Tensors:
    """Return the gate that a task begins with: centres spread evenly over the spectrum ``s``,
    widths ``j / kernels`` of its range, gains 1."""
    lowest, reach = s.min(), s.max() - s.min()
    steps = torch.arange(1, kernels + 1, dtype=s.dtype) / kernels
    return {
        "gate.centres": lowest + reach * torch.linspace(0, 1, kernels, dtype=s.dtype),
        "gate.log_widths": (steps * reach).square().clamp(min=SMALLEST).log(),
        "gate.gains": torch.ones(kernels, s.numel(), dtype=s.dtype),
    }


def mlp(matrix: Tensor, learned: Tensors) -> Tensor:
    """Return ``W_2 relu(W_1 Y + b_1) + b_2``, eq. 11, of a matrix whose columns are examples."""
    hidden = learned["mlp.hidden_weight"] @ matrix + learned["mlp.hidden_bias"][:, None]
    return learned["mlp.out_weight"] @ torch.relu(hidden) + learned["mlp.out_bias"][:, None]


def drawn_mlp(n: int, generator: torch.Generator) -> Tensors:
    """For columns of length ``n``: Kaiming-uniform weights, zero biases."""
    hidden = max(NARROWEST, min(n, WIDEST))
    return {
        "mlp.hidden_weight": _kaiming(hidden, n, generator),
        "mlp.hidden_bias": torch.zeros(hidden),
        "mlp.out_weight": _kaiming(n, hidden, generator),
        "mlp.out_bias": torch.zeros(n),
    }


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    weight = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
    return weight
