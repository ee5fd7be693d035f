"""Gradients of groups: the mean of each, clipped as a whole, against a loop over its examples."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.randomness import seeded
from tests.deal_core.training.clipped import clipped_group_gradients

LABELS = ["red", "green", "blue"]
BOTH = frozenset({"lora_A", "lora_B"})
GROUPS = [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 4, 4]
"""Of twelve examples; those of a group follow each other."""


@pytest.fixture(scope="module")
def model(make_causal, random_adapter, tmp_path_factory):
    folder = make_causal(tmp_path_factory.mktemp("llama"), "llama")
    made = load_model(
        ModelConfig(family="causal-lm", name=str(folder)), AdapterConfig(), 32, torch.float32
    )
    write(made.module, random_adapter(read(made.module).shapes, 8, 0.01, seed=5))
    return made


@pytest.fixture(scope="module")
def data() -> list[Encoded]:
    generator = seeded("group texts")
    lengths = torch.randint(3, 9, (len(GROUPS),), generator=generator).tolist()
    return [
        Encoded((1, *torch.randint(3, 20, (n,), generator=generator).tolist()), i % 3)
        for i, n in enumerate(lengths)
    ]


def taken(parameters) -> torch.Tensor:
    row = torch.cat([p.grad.flatten().double() for p in parameters])
    for p in parameters:
        p.grad = None
    return row


def rows_of(model, objective, parameters, count: int) -> torch.Tensor:
    """Gradients one by one by ordinary differentiation, ``(count, entries)``."""
    rows = []
    for i in range(count):
        objective.example_losses([i]).sum().backward()
        rows.append(taken(parameters))
    return torch.stack(rows)


def by_loop(rows: torch.Tensor, groups, batch, bound: float) -> torch.Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for number in dict.fromkeys(groups[i] for i in batch):
        mean = rows[[i for i in batch if groups[i] == number]].mean(dim=0)
        total += mean * min(1.0, bound / float(mean.norm()))
    return total


@pytest.mark.parametrize("trained", [{"lora_B"}, {"lora_A", "lora_B"}])
def test_it_is_the_sum_of_clipped_means(model, data, trained):
    parameters = set_trainable(model.module, frozenset(trained))
    objective = Plain(model, LABELS, data)
    rows = rows_of(model, objective, parameters, 12)
    means = torch.stack([rows[torch.tensor(GROUPS) == n].mean(dim=0) for n in range(5)])
    bound = float(means.norm(dim=1).median())  # some are clipped, some are not
    norms = clipped_group_gradients(model.module, objective, range(12), GROUPS, bound)
    ours = taken(parameters)
    expected = by_loop(rows, GROUPS, range(12), bound)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(norms.double(), means.norm(dim=1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fault", ["nan", "raises", "overflows"])
@pytest.mark.parametrize("bad", [0, 5, 9])
def test_an_example_that_fails_changes_its_own_group_alone(model, data, fault, bad):
    parameters = set_trainable(model.module, BOTH)
    plain = Plain(model, LABELS, data)

    class Stumbling:
        def example_losses(self, batch):
            losses = plain.example_losses(batch)
            if bad not in batch:
                return losses
            if fault == "raises":
                raise RuntimeError("a record that cannot be read")
            if fault == "nan":  # it may take the whole pass along
                return losses * torch.nan
            return losses * torch.tensor([1e38 if i == bad else 1.0 for i in batch])

    rows = rows_of(model, plain, parameters, 12)
    rows[bad] = 0.0  # it adds nothing; the mean is over all of its group
    clipped_group_gradients(model.module, Stumbling(), range(12), GROUPS, 0.3)
    ours = taken(parameters)
    own = GROUPS[bad]
    others = [i for i in range(12) if GROUPS[i] != own]
    expected = by_loop(rows, GROUPS, others, 0.3)
    members = [i for i in range(12) if GROUPS[i] == own]
    mean = rows[members].mean(dim=0)
    if float(mean.norm()) > 0:
        expected += mean * min(1.0, 0.3 / float(mean.norm()))
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


def test_a_group_in_two_pieces_is_refused(model, data):
    """Each piece would be clipped by itself, and the group count twice."""
    set_trainable(model.module, BOTH)
    objective = Plain(model, LABELS, data)
    for batch in ([0, 3, 1], [0, 1, 3, 2], [0, 3, 0], [4, 5, 4, 3, 4]):
        with pytest.raises(ValueError, match="follow each other"):
            clipped_group_gradients(model.module, objective, batch, GROUPS, 0.3)
        for factor in model.module.parameters():
            factor.grad = None
