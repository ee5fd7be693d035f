from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.baselines.memory import anchored, drawn_labels, fisher_diagonal
from deal_core.config.experiment import AdapterConfig, MethodConfig
from deal_core.data import Example
from deal_core.deal.interface import LocalTask, TaskDataset, TaskHistory
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, zero_adapter
from deal_core.lora.attach import factors_in, read, set_trainable
from deal_core.lora.payload import factor_of
from deal_core.lora.state import State, by_key, snapshot_task_start
from deal_core.methods import make_method
from deal_core.models import load_model
from deal_core.randomness import seeded
from deal_core.training.loop import load_state
from tests.architectures import model_config, save

LABELS = ("Anatomy", "Surgery")
EARLIER = ("Dental", "Skin", "Eye")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
]
OLD = [
    Example("Caries of the lower molar", "Dental"),
    Example("A scaly plaque on the elbow, silvery, itching in winter", "Skin"),
    Example("Blurred vision", "Eye"),
    Example("An ulcer on the gum that does not heal for many weeks", "Dental"),
]
BOTH = frozenset({"lora_A", "lora_B"})


class TaskMemory:
    """In memory; remembers from which task each was made."""

    def __init__(self):
        self.made = {}
        self.bases = {}

    def get_or_compute(self, tasks, basis, make):
        if self.bases.get(tasks) != basis:
            before = max((n for n in self.made if n < tasks), default=0)
            self.made[tasks] = make(before, self.made.get(before, {}))
            self.bases[tasks] = basis
        return self.made[tasks]


def learnt_adapter(random_adapter, shapes, seed):
    drawn = random_adapter(shapes, 8, 2.0, seed)
    layers = {n: LoraFactors(f.A * 0.05, f.B * 0.02) for n, f in drawn.layers.items()}
    return Adapter(layers, drawn.scaling)


def test_words_are_drawn_by_the_likelihood_of_whole_labels(tmp_path, small_adapter):
    """A mean over tokens would make every long label about as likely as the rest."""
    model = load_model(model_config(save(tmp_path, "llama"), "llama"), small_adapter, 32)
    labels = ("red", "blue_green_red", "a_b")
    (item,) = model.encode([Example("c c d", "a_b")], labels)
    with torch.no_grad():
        means = model.scores([item], labels)
        expected = (means * torch.tensor([1, 3, 2])).softmax(dim=1)
        assert (expected - means.softmax(dim=1)).abs().max() > 0.1
    share = TaskDataset(labels, [item] * 400)
    drawn = drawn_labels(model, share, [range(400)], seeded("words"))
    shares = torch.bincount(torch.tensor([d.target for d in drawn]), minlength=3) / 400
    assert (shares - expected[0]).abs().max() < 4 * 0.5 / 400**0.5


@pytest.fixture(scope="module")
def second_task(shapes, random_adapter):
    """Some round of a task: the current adapter has moved since its start."""
    before = State(learnt_adapter(random_adapter, shapes, 3), zero_adapter(shapes, 16))
    held = snapshot_task_start(before)
    return replace(held, current=learnt_adapter(random_adapter, shapes, 4))


@pytest.fixture(scope="module")
def start(shapes, random_adapter):
    return State(learnt_adapter(random_adapter, shapes, 3), zero_adapter(shapes, 16))


def close(found, expected, rtol=0.001):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= rtol * value.norm() + 1e-12, key


def one_by_one(minilm, data, labels):
    """Mean of squared gradients of single examples, through ordinary backward passes."""
    set_trainable(minilm.module, BOTH)
    total = {key: torch.zeros_like(p) for key, p in factors_in(minilm.module).items()}
    for item in data:
        scores = minilm.scores([item], labels)
        cross_entropy(scores, torch.tensor([item.target])).backward()
        for key, p in factors_in(minilm.module).items():
            total[key] += p.grad.square() / len(data)
            p.grad = None
    return total


def test_the_fisher_diagonal_is_that_of_a_loop_over_examples(minilm, start):
    load_state(minilm, start)
    share = TaskDataset(EARLIER, minilm.encode(OLD, EARLIER))
    found = fisher_diagonal(minilm, share, "seed")
    lengths = [len(item.tokens) for item in share.data]
    ordered = sorted(range(4), key=lambda i: lengths[i])
    drawn = drawn_labels(minilm, share, [ordered], seeded("fisher", "seed"))
    close(found, one_by_one(minilm, drawn, EARLIER))
    assert all(p.grad is None for p in factors_in(minilm.module).values())


@pytest.mark.parametrize("trained", [{"lora_A"}, {"lora_B"}, {"lora_A", "lora_B"}])
def test_the_penalty_and_its_gradient_are_the_formula(minilm, start, second_task, trained):
    load_state(minilm, second_task)
    generator = seeded("fisher")
    anchor = by_key(start.current)
    fisher = {key: torch.rand(value.shape, generator=generator) for key, value in anchor.items()}
    set_trainable(minilm.module, frozenset(trained))
    found = anchored(minilm.module, fisher, anchor, 3.0)
    found.backward()
    now, expected = by_key(second_task.current), 0.0
    for key, p in factors_in(minilm.module).items():
        if factor_of(key) in trained:
            expected += float((1.5 * fisher[key] * (now[key] - anchor[key]) ** 2).sum())
            gradient = 3.0 * fisher[key] * (now[key] - anchor[key])
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
        else:
            assert p.grad is None
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def objective(minilm, state, kept, shares, weight=1000.0, known=None):
    method = MethodConfig.model_validate({"name": "ewc", "ewc": {"weight": weight}})
    known = len(shares) if known is None else known
    past = TaskHistory([lambda share=share: share for share in shares], kept, known)
    data = minilm.encode(DATA, LABELS)
    task = LocalTask(minilm, state, data, LABELS, (EARLIER,), past)
    built = make_method(method, AdapterConfig())
    return built.objective(task), data


def test_it_is_measured_at_the_start_of_the_task_in_any_round(minilm, start, second_task):
    """A client that first takes part in a later round measures what others did in the first; and
    the model is left as it was found."""
    share = TaskDataset(EARLIER, minilm.encode(OLD, EARLIER))
    first, later = TaskMemory(), TaskMemory()
    begun = replace(second_task, current=start.current)
    for state, kept in ((begun, first), (second_task, later)):
        load_state(minilm, state)
        objective(minilm, state, kept, [share])
        left = read(minilm.module)
        assert relative_difference(left, state.current) == pytest.approx(0.0, abs=1e-9)
    assert all(torch.equal(first.made[1][key], value) for key, value in later.made[1].items())
    load_state(minilm, start)
    ordered = sorted(range(4), key=lambda i: len(share.data[i].tokens))
    seed = seeded("fisher", later.bases[1])
    close(later.made[1], one_by_one(minilm, drawn_labels(minilm, share, [ordered], seed), EARLIER))


def test_the_sum_runs_over_tasks_and_a_missed_one_is_measured_late(minilm, second_task):
    shares = [
        TaskDataset(EARLIER, minilm.encode(OLD, EARLIER)),
        TaskDataset(LABELS, minilm.encode(DATA, LABELS)),
    ]
    load_state(minilm, second_task)
    kept, late = TaskMemory(), TaskMemory()
    objective(minilm, second_task, kept, shares[:1])
    objective(minilm, second_task, kept, shares)
    alone = TaskMemory()
    objective(minilm, second_task, alone, [TaskDataset(EARLIER, []), shares[1]])
    close(kept.made[2], {k: v + alone.made[2][k] for k, v in kept.made[1].items()}, 1e-5)
    objective(minilm, second_task, late, shares)
    close(late.made[2], kept.made[2], 1e-5)


def test_what_was_learnt_since_the_start_is_not_held_to_it(minilm, second_task):
    """Of a task that ended within the stage the start knows nothing; it is measured afterwards."""
    shares = [
        TaskDataset(EARLIER, minilm.encode(OLD, EARLIER)),
        TaskDataset(LABELS, minilm.encode(DATA, LABELS)),
    ]
    load_state(minilm, second_task)
    within, apart = TaskMemory(), TaskMemory()
    built, _ = objective(minilm, second_task, within, shares[:1], known=0)
    assert built.penalty() is None
    assert not within.made
    objective(minilm, second_task, within, shares, known=1)
    objective(minilm, second_task, apart, shares[:1])
    close(within.made[1], apart.made[1], 1e-6)
    objective(minilm, second_task, within, shares, known=2)
    objective(minilm, second_task, apart, shares)
    close(within.made[2], apart.made[2], 1e-6)
