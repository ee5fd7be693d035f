"""Distillation: the loss against its formula; what ``deal`` and ``lwf`` distil from the model as it
was at the start of a task, and how that is held."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.config.experiment import AdapterConfig, MethodConfig
from deal_core.data import Example
from deal_core.deal.distillation import distillation_losses
from deal_core.deal.interface import LocalTask
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.state import State, drop_task_start, snapshot_task_start, start_of
from deal_core.methods import make_method
from deal_core.randomness import seeded
from deal_core.training.loop import load_state

LABELS = ("Anatomy", "Surgery")
SEEN = ("Dental", "Skin", "Eye")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("Bones", "Anatomy"),
]
SHAPES = {"first": (40, 50), "second": (60, 40)}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(student, teacher):
    """At temperature 2."""
    p = (teacher / 2.0).softmax(1)
    q = (student / 2.0).softmax(1)
    return 4.0 * (p * (p / q).log()).sum(1)


def test_equals_the_plain_formula_for_every_example():
    student, teacher = draw(0, 5, 3), draw(1, 5, 3)
    found = distillation_losses(student, teacher, [3], [1.0])
    torch.testing.assert_close(found, plain(student, teacher))


def test_every_space_has_the_weight_it_is_given():
    student, teacher = draw(0, 4, 7), draw(1, 4, 7)
    parts = [plain(student[:, part], teacher[:, part]) for part in (slice(0, 2), slice(2, 7))]
    found = distillation_losses(student, teacher, [2, 5], [0.5, 3.0])
    torch.testing.assert_close(found, 0.5 * parts[0] + 3.0 * parts[1])
    with pytest.raises(ValueError, match="zip"):
        distillation_losses(student, teacher, [2, 5], [0.5])


def test_what_a_space_has_in_common_is_free_but_not_between_spaces_that_are_merged():
    teacher = draw(1, 4, 5)
    shifted = teacher + torch.tensor([3.0, 3.0, -1.0, -1.0, -1.0])
    apart = distillation_losses(shifted, teacher, [2, 3], [1.0, 1.0])
    together = distillation_losses(shifted, teacher, [5], [1.0])
    assert apart.max() < 1e-6
    assert together.min() > 0.1


def test_the_teacher_gets_no_gradient_and_the_student_does():
    student = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], requires_grad=True)
    distillation_losses(student, teacher, [3], [1.0]).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_nothing_to_distil_is_zero_and_still_differentiable():
    student = torch.zeros(4, 3, requires_grad=True)
    losses = distillation_losses(student[:, :0], torch.zeros(4, 0), [0], [1.0])
    losses.sum().backward()
    assert not losses.any()


def learnt_adapter(random_adapter, shapes, seed):
    """Factors of the size that training gives them."""
    drawn = random_adapter(shapes, 8, 2.0, seed)
    layers = {n: LoraFactors(f.A * 0.05, f.B * 0.02) for n, f in drawn.layers.items()}
    return Adapter(layers, drawn.scaling)


@pytest.fixture(scope="module")
def after_one_task(shapes, random_adapter):
    nothing = zero_adapter(shapes, 8, 2.0)
    return State(nothing, learnt_adapter(random_adapter, shapes, 3))


AHEAD = (("Eye", "Ear"), LABELS[::-1], SEEN, ("Ear", "Eye"), ("Bone", "Eye"))


@pytest.mark.parametrize(
    ("tables", "seen", "choices"),
    [
        ({"future_weight": 0.5}, (SEEN,), {SEEN: 1.0, ("Eye", "Ear"): 0.25, ("Bone", "Eye"): 0.25}),
        (
            {"future_weight": 0.5, "weight": 0.0},
            (SEEN,),
            {("Eye", "Ear"): 0.25, ("Bone", "Eye"): 0.25},
        ),
        ({"future_weight": 0.0}, (SEEN,), {SEEN: 1.0}),
        ({"future_weight": 3.0}, (), {("Eye", "Ear"): 1.0, SEEN: 1.0, ("Bone", "Eye"): 1.0}),
    ],
)
def test_what_tasks_to_come_choose_between_weighs_as_told_but_for_what_is_known(
    minilm, after_one_task, tables, seen, choices
):
    """Labels of a task to come that are being learnt, or have been, are none of its own."""
    built = make_method(MethodConfig.model_validate({"distillation": tables}), AdapterConfig())
    state = built.begin_task(after_one_task, seeded(0))
    load_state(minilm, state)
    data = minilm.encode(DATA, LABELS)
    task = LocalTask(minilm, state, data, LABELS, seen, future=lambda: AHEAD)
    objective = built.objective(task)
    assert dict(zip(objective.spaces, objective.weights, strict=True)) == choices


def test_in_the_first_task_the_base_model_speaks_for_tasks_to_come(minilm, shapes, random_adapter):
    tables = {"distillation": {"future_weight": 0.7}}
    built = make_method(MethodConfig.model_validate(tables), AdapterConfig())
    empty = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    begun = built.begin_task(empty, seeded(0))
    moved = replace(begun, current=learnt_adapter(random_adapter, shapes, 4))
    check_losses(minilm, built, (), (SEEN,), start=empty, now=moved, alone=moved, weight=0.7)


def check_losses(minilm, method, seen, to_come, start, now, alone, weight):
    """``CE + weight * T^2 KL`` at temperature 2 over ``SEEN``, of the model ``now``, which
    ``alone`` is as well, from the model ``start``."""
    data = minilm.encode(DATA, LABELS)
    load_state(minilm, start)
    with torch.no_grad():
        teacher = minilm.scores(data, SEEN)
    load_state(minilm, now)
    objective = method.objective(LocalTask(minilm, now, data, LABELS, seen, future=lambda: to_come))
    with torch.no_grad():
        losses = objective.example_losses(range(len(data)))
        load_state(minilm, alone)
        new, divergence = minilm.scores(data, LABELS), plain(minilm.scores(data, SEEN), teacher)
    targets = torch.tensor([item.target for item in data])
    expected = cross_entropy(new, targets, reduction="none") + weight * divergence
    assert (divergence > 1e-3).all()
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_task_learnt(shapes, random_adapter):
    """As ``end_task`` leaves it: the adapter has learnt something."""
    return State(learnt_adapter(random_adapter, shapes, 3), zero_adapter(shapes, 16))


def bits(state):
    return [t for part in state.parts() for f in part.layers.values() for t in (f.A, f.B)]


@pytest.mark.parametrize("residual_rank", [0, 3])
def test_the_start_is_held_and_released_to_the_bit(random_adapter, residual_rank):
    gained = random_adapter(SHAPES, residual_rank, 1.0, 2) if residual_rank else None
    state = State(random_adapter(SHAPES, 4, 2.0, 1), zero_adapter(SHAPES, 1), gained)
    held = snapshot_task_start(state)
    assert relative_difference(stack(held.parts()), stack(state.parts())) < 1e-6
    assert relative_difference(held.retained, stack(state.parts())) < 1e-6
    back = drop_task_start(held)
    assert all(torch.equal(a, b) for a, b in zip(bits(back), bits(state), strict=True))


def test_what_an_exact_rule_leaves_over_is_kept(random_adapter):
    """A task in which the current adapter moves and the residual gains: nothing is lost, and the
    start of the task stays what it was."""
    state = State(
        random_adapter(SHAPES, 4, 2.0, 1), zero_adapter(SHAPES, 6), random_adapter(SHAPES, 3, 1, 2)
    )
    held = snapshot_task_start(state)
    moved = State(
        random_adapter(SHAPES, 4, 2.0, 3),
        held.retained,
        random_adapter(SHAPES, 2, 1.0, 4),
        held.num_reference_directions,
    )
    released = drop_task_start(moved)
    assert released.residual.rank == 5
    assert relative_difference(stack(released.parts()), stack(moved.parts())) < 1e-6
    began = start_of(moved)
    assert relative_difference(began.current, state.current) < 1e-12
    assert relative_difference(stack(began.parts()), stack(state.parts())) < 1e-6


def test_the_teacher_is_asked_task_by_task(minilm, one_task_learnt):
    built = make_method(MethodConfig(name="lwf"), AdapterConfig())
    state = built.begin_task(one_task_learnt, seeded(0))
    load_state(minilm, state)
    seen = (("Dental", "Skin"), ("Eye",))
    data = minilm.encode(DATA, LABELS)
    to_come = (("Ear",),)  # none of its business
    task = LocalTask(minilm, state, data, LABELS, seen, future=lambda: to_come)
    objective = built.objective(task)
    assert objective.spaces == list(seen)


def test_lwf_has_the_start_as_teacher_in_any_round(minilm, one_task_learnt, random_adapter, shapes):
    """A client that first takes part in the second round has the same teacher."""
    built = make_method(MethodConfig(name="lwf"), AdapterConfig())
    begun = built.begin_task(one_task_learnt, seeded(0))
    later = replace(begun, current=learnt_adapter(random_adapter, shapes, 4))
    alone = State(later.current, one_task_learnt.retained)
    check_losses(
        minilm, built, (SEEN,), (), start=one_task_learnt, now=later, alone=alone, weight=1.0
    )
