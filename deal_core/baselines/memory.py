"""Baselines whose clients keep something of earlier tasks on their own disks: ``ewc`` what matters
to those tasks, ``replay`` texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from deal_core.baselines.sequential import HeldStart, Sequential
from deal_core.deal.interface import LocalTask, TaskDataset, TaskHistory, Tensors
from deal_core.deal.objective import Penalised, Placed, Plain, losses_by_task, plain
from deal_core.lora.adapter import fingerprint
from deal_core.lora.attach import example_gradient, learning_factors, merge, set_trainable, write
from deal_core.lora.state import State, by_key, start_of
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.randomness import seeded
from deal_core.training.loop import Objective, within_budget

BOTH = frozenset({"lora_A", "lora_B"})
TOKENS = 2048
"""In one pass that labels are drawn in, padding included: bounds memory alone."""


@dataclass(frozen=True)
class Ewc(HeldStart):
    """One adapter, held where it matters to the client's earlier tasks.

    As ``sequential``, plus ``weight / 2 * sum F (theta - theta*)^2`` over the adapter's factors
    (M20): ``theta*`` is the global adapter at the start of the task, ``F`` the diagonal Fisher
    information of the earlier tasks. Source: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; one
    running sum and the latest ``theta*`` instead of a term per task: Schwarz et al., ICML 2018,
    arXiv 1805.06370 (online EWC, nothing decayed).

    In the federation. Each client has its own ``F``, of its own data, and nothing of it travels. At
    the first round of a task that it takes part in, it measures the task before, at ``theta*``, and
    adds that to the sum which it keeps on its disk; a task whose successor it sat out, or that
    ended since ``theta*``, is measured late, at the next ``theta*``. The server averages adapters
    as ever.

    The Fisher information is the true one: labels are drawn from what the model expects, not taken
    from the data (Kunstner et al. 2019). Where answers are texts it is the empirical one, of the
    texts that the data hold: to draw one is to write it. A generating model's loss is a mean over
    the answer's tokens, and its square is what is measured.

    Limits. Factors are compared entry by entry, so the rule must keep their coordinates: ``fedit``,
    ``ffa``. ``F`` is computed from private data and shapes the update: under differential privacy
    it would need a share of the budget, and gets none here.
    """

    weight: float

    def objective(self, task: LocalTask) -> Objective:
        """Return ``CE + weight / 2 * sum F (theta - theta*)^2``; plain while ``theta*`` knows no
        task of the client."""
        learning = plain(task)
        if task.past is None or not task.past.known:
            return learning
        model = task.model
        fisher = importance(model, task.state, task.past)
        start = by_key(start_of(task.state).current)
        anchor = {key: factor.to(model.device) for key, factor in start.items()}
        return Penalised(learning, lambda: anchored(model.module, fisher, anchor, self.weight))


def anchored(module: nn.Module, fisher: Tensors, anchor: Tensors, weight: float) -> Tensor:
    """Return ``weight / 2 * sum F (theta - theta*)^2`` over the factors that learn; ``fisher`` has
    ``F`` and ``anchor`` has ``theta*`` by key."""
    terms = [
        (fisher[key] * (factor - anchor[key]).square()).sum()
        for key, factor in learning_factors(module).items()
    ]
    return weight / 2 * torch.stack(terms).sum()


def importance(model: LanguageModel, state: State, past: TaskHistory) -> Tensors:
    """Return the running sum of Fisher diagonals over the client's earlier tasks that ``theta*``
    knows, each a mean over the examples of the task. The model is left as it was found."""

    def measured(before: int, total: Tensors) -> Tensors:
        start = start_of(state)
        merge(model.module, start.retained, start.residual, start.num_reference_directions)
        write(model.module, start.current)
        for share in past.shares[before : past.known]:
            gained = fisher_diagonal(model, share(), basis)
            total = {key: value + total.get(key, 0.0) for key, value in gained.items()}
        merge(model.module, state.retained, state.residual, state.num_reference_directions)
        write(model.module, state.current)
        return total

    basis = fingerprint(state.retained)
    kept = past.kept.get_or_compute(past.known, basis, measured)
    return {key: value.to(model.device) for key, value in kept.items()}


def fisher_diagonal(model: LanguageModel, share: TaskDataset, seed: str) -> Tensors:
    """Return ``mean_x E_{y ~ p(y | x)} (d loss(x, y) / d theta)^2`` by key, one draw of ``y`` for
    every ``x``; zeros where there is no data."""
    set_trainable(model.module, BOTH)
    ordered = sorted(range(len(share.data)), key=lambda i: len(share.data[i].tokens))
    passes = within_budget(share.data, ordered, TOKENS)
    expected = drawn_labels(model, share, passes, seeded("fisher", seed))
    objective = Plain(model, share.labels, expected)
    sums = {key: torch.zeros_like(own) for key, own in learning_factors(model.module).items()}
    for example in range(len(expected)):
        for key, gradient in example_gradient(model.module, objective, example).items():
            sums[key] += gradient.square()
    return {key: total.cpu() / max(1, len(share.data)) for key, total in sums.items()}


def drawn_labels(
    model: LanguageModel,
    share: TaskDataset,
    passes: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> list[Encoded]:
    """Return the examples, each with a label drawn from the model's own distribution; as they are
    where answers are texts."""
    if not share.labels:
        return list(share.data)
    relabelled = list(share.data)
    for part in passes:
        items = [share.data[i] for i in part]
        with torch.no_grad():
            # Of words, a label's probability is the product over its tokens, and not their mean.
            ask = model.log_likelihoods if isinstance(model, GeneratingModel) else model.scores
            chances = ask(items, share.labels).softmax(dim=1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).flatten().tolist()
        for i, item, target in zip(part, items, drawn, strict=True):
            relabelled[i] = Encoded(item.tokens, target)
    return relabelled


SHARE = 0.1
"""Of a client's examples of every earlier task that it keeps, rounded up."""


@dataclass(frozen=True)
class Replay(Sequential):
    """One adapter that goes on practising examples of earlier tasks.

    **Not private**: the client keeps texts of earlier tasks, and trains on them again. An upper
    baseline for methods that keep none.

    Every new example of a batch brings one old example along, with the label space of its own task:
    ``CE(new) + CE(old)`` (M22). So a round has the steps of any other method (each of them twice as
    dear), and new and old examples have equal parts whatever the number of tasks. Source:
    experience replay (Robins 1995; Rolnick et al., NeurIPS 2019, arXiv 1811.11682); Chaudhry et al.
    2019, arXiv 1902.10486, draw a batch of new and as many old examples, as here.
    """

    share: float = SHARE
    """Of earlier examples that is kept."""

    def objective(self, task: LocalTask) -> Objective:
        """Return ``CE(new) + CE(old)``; plain in the first task, or where nothing is kept."""
        learning = plain(task)
        old = kept_examples(task.past, self.share) if task.past is not None else []
        if task.past is None or not old:
            return learning
        # Other partners in every round, also where what is learnt goes into the residual.
        moved = [each for each in (task.state.current, task.state.residual) if each is not None]
        generator = seeded("replay", *map(fingerprint, moved))
        partners = paired(old, len(task.data), generator)
        labels = [share().labels for share in task.past.shares]
        return Replayed(task.model, learning, labels, partners)


@dataclass(frozen=True)
class Replayed(Objective):
    """Cross-entropy of every new example and of its old partner; ``labels``: label spaces of the
    earlier tasks, by their position."""

    model: LanguageModel
    learning: Objective
    labels: Sequence[Sequence[str]]
    partners: Sequence[Placed]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE(new) + CE(old)``, ``(batch,)``."""
        new = self.learning.example_losses(batch)
        old = losses_by_task(self.model, self.labels, [self.partners[i] for i in batch])
        return new + old


def kept_examples(past: TaskHistory, share: float) -> list[Placed]:
    """Return a part of every earlier task's examples, rounded up, the same in all later tasks."""
    kept: list[Placed] = []
    for position, read in enumerate(past.shares):
        data = read().data
        # Of the share as it is written: the float product of 0.07 and 100 is above 7.
        count = math.ceil(Fraction(str(share)) * len(data))
        order = torch.randperm(len(data), generator=seeded("kept", position)).tolist()
        kept += [(position, data[i]) for i in order[:count]]
    return kept


def paired(old: Sequence[Placed], count: int, generator: torch.Generator) -> list[Placed]:
    """Partners for ``count`` new examples: every old one equally often, give or take one."""
    rounds = math.ceil(count / len(old))
    orders = [torch.randperm(len(old), generator=generator) for _ in range(rounds)]
    return [old[i] for i in torch.cat(orders)[:count].tolist()]
