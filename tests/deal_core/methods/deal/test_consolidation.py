"""Consolidation: what the server lays out, what clients lower, what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softmax

from deal_core.config.data import DataConfig
from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.config.file import parse_experiment
from deal_core.config.method import ConsolidationConfig, MethodConfig
from deal_core.data import Example, open_source
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.attach import read, set_trainable
from deal_core.lora.state import State
from deal_core.methods import LocalTask, Phase, make_method
from deal_core.models import Encoded, adapter_shapes
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.training.loop import load_state, train
from tests.deal_core.training.accumulated import accumulate

SHAPES = {"first": (40, 50), "second": (60, 40)}
SMALL = AdapterConfig(rank=4, retained_rank=6, lora_alpha=9.0)
REAL = AdapterConfig(rank=8, retained_rank=4, lora_alpha=16.0)
SEEN = ("Dental", "Skin", "Eye")
BOTH = frozenset({"lora_A", "lora_B"})


def consolidating(filter_: str = "identity", **keys: object) -> MethodConfig:
    retention = {"filter": filter_, **({"noise": 0.3} if filter_ != "identity" else {})}
    return MethodConfig.model_validate(
        {"retention": retention, "consolidation": {"data": "private", **keys}}
    )


def phase_of(method: MethodConfig, adapter: AdapterConfig) -> Phase:
    (phase,) = make_method(method, adapter).phases
    return phase


def test_a_teacher_of_no_example_is_not_kept_for_all(minilm, random_adapter):
    """Under a mechanism a round that fails is trained once more, on nothing."""
    phase, cache = phase_of(consolidating(), REAL), Cache()
    shapes = read(minilm.module).shapes
    begun = phase.setup(State(random_adapter(shapes, 8, 2.0, 1), random_adapter(shapes, 4, 1.0, 2)))
    data = minilm.encode([Example("an itching eye", "Eye")], SEEN)
    load_state(minilm, begun)
    task = LocalTask(SEEN, ())
    phase.objective(minilm, begun, task, (), cache)
    losses = phase.objective(minilm, begun, task, data, cache).example_losses([0])
    assert losses.isfinite().all()


@pytest.fixture
def end_of_learning(random_adapter) -> State:
    """Retained, a residual, and a current adapter: 12 directions for a student of 6."""
    return State(
        random_adapter(SHAPES, 4, 2.25, 1),
        random_adapter(SHAPES, 6, 1.0, 2),
        random_adapter(SHAPES, 2, 1.0, 3),
    )


@pytest.mark.parametrize("name", ["identity", "wiener", "learned"])
def test_the_student_starts_from_what_the_server_alone_would_keep(end_of_learning, name):
    phase = phase_of(consolidating(name), SMALL)
    begun = phase.setup(end_of_learning)
    whole = stack(end_of_learning.parts())
    start = name if name != "learned" else "wiener"
    retention = consolidating(start).retention.model_copy(update={"filter": start})
    alone = make_method(MethodConfig(retention=retention), SMALL).end_task(end_of_learning)
    assert (begun.current.rank, begun.current.scaling) == (6, 1.5)
    assert relative_difference(stack(begun.parts()), alone.retained) < 1e-6
    assert relative_difference(begun.retained, whole) < 1e-6
    assert begun.num_reference_directions == begun.retained.rank == 12
    ended = make_method(consolidating(name), SMALL).end_task(begun)
    assert relative_difference(ended.retained, alone.retained) < 1e-6
    assert (ended.current.rank, ended.current.scaling, ended.num_reference_directions) == (
        4,
        2.25,
        0,
    )
    assert not any(f.B.any() for f in ended.current.layers.values())


def test_heads_and_what_the_server_keeps_outlive_rounds_of_consolidation(end_of_learning):
    """Clients give their class sums once: what is lost here is never asked for again."""
    known = {"heads": {"skin": torch.ones(3, 2, 5)}, "sums": {"count/skin": torch.ones(3)}}
    method = make_method(consolidating(), SMALL)
    begun = method.phases[0].setup(replace(end_of_learning, **known))
    for state in (begun, method.end_task(begun)):
        assert state.heads == known["heads"]
        assert state.sums == known["sums"]


def test_where_no_phase_followed_the_filter_still_holds(end_of_learning):
    """All tasks at once have no phase after them."""
    alone = consolidating("wiener").model_copy(update={"consolidation": ConsolidationConfig()})
    kept = make_method(alone, SMALL).end_task(end_of_learning).retained
    ended = make_method(consolidating("wiener"), SMALL).end_task(end_of_learning)
    assert relative_difference(ended.retained, kept) < 1e-6


def test_what_a_rule_puts_beside_the_student_is_kept_as_far_as_it_fits(
    end_of_learning, random_adapter
):
    method = make_method(consolidating(), SMALL)
    begun = method.phases[0].setup(end_of_learning)
    beside = random_adapter(SHAPES, 3, 1.0, 4)
    fresh = zero_adapter(SHAPES, 6, 1.5)  # as flora leaves it
    ended = method.end_task(replace(begun, current=fresh, residual=beside))
    assert relative_difference(ended.retained, beside) < 1e-6
    assert ended.retained.rank == 6
    assert ended.residual is None


def test_a_round_is_due_only_where_something_was_cut(end_of_learning, random_adapter):
    phase = phase_of(consolidating(), SMALL)
    assert phase.should_run(phase.setup(end_of_learning))
    little = State(random_adapter(SHAPES, 4, 2.25, 1), zero_adapter(SHAPES, 6))
    fits = phase.setup(little)
    assert not phase.should_run(fits)
    assert phase.should_run(replace(fits, residual=random_adapter(SHAPES, 1, 1e-3, 5)))
    filtered = phase_of(consolidating("wiener"), SMALL)
    filtered_begun = filtered.setup(
        State(random_adapter(SHAPES, 4, 0.01, 1), zero_adapter(SHAPES, 6))
    )
    assert filtered.should_run(filtered_begun)
    nothing = State(zero_adapter(SHAPES, 4, 2.25), zero_adapter(SHAPES, 6))
    assert not phase.should_run(phase.setup(nothing))


def test_parts_that_need_each_other_are_named():
    learned = MethodConfig.model_validate({"retention": {"filter": "learned"}})
    with pytest.raises(UserError, match=r"filter = \"learned\".*consolidation.data"):
        make_method(learned, SMALL)
    off = {"retention": {"enabled": False}, "consolidation": {"data": "private"}}
    with pytest.raises(UserError, match=r"consolidation.data.*retention.enabled"):
        make_method(MethodConfig.model_validate(off), SMALL)
    with pytest.raises(UserError, match=r"method.consolidation: .*raise a"):
        parse_experiment({"method": {"consolidation": {"a": 1.0, "b": 2.0}}}, "test")


@pytest.fixture(scope="module")
def task(minilm):
    """A client's real data of one task, the first words of every text."""
    config = DataConfig(tasks=("laboratory",), max_train=32)
    data = open_source(config).load("laboratory")
    encoded = minilm.encode(data.train, data.labels)
    return data.labels, [Encoded((*e.tokens[:15], e.tokens[-1]), e.target) for e in encoded]


@pytest.fixture(scope="module")
def learnt(random_adapter) -> State:
    """Two adapters whose spectra fall, as training leaves them: rank 4 cannot hold them."""
    shapes = adapter_shapes(ModelConfig(), REAL)

    def falling(rank: int, scaling: float, seed: int) -> Adapter:
        drawn, fall = random_adapter(shapes, rank, scaling, seed), torch.linspace(1.0, 0.3, rank)
        layers = {n: LoraFactors(f.A * 0.05, f.B * 0.03 * fall) for n, f in drawn.layers.items()}
        return Adapter(layers, scaling)

    return State(falling(8, 2.0, 1), falling(4, 1.0, 2))


def teacher_logits(minilm, state: State, task, temperature: float) -> torch.Tensor:
    """What the model of a state says over the labels of all tasks."""
    labels, data = task
    load_state(minilm, state)
    with torch.no_grad():
        return softmax(minilm.scores(data, (*SEEN, *labels)) / temperature, 1)


def divergence(minilm, state: State, task, temperature: float = 2.0) -> float:
    """The mean loss by its formula, from nothing but scores of whole models."""
    everything = State(zero_adapter(state.current.shapes, 1), state.retained)
    teacher = teacher_logits(minilm, everything, task, temperature)
    student = teacher_logits(minilm, state, task, temperature)
    return float(temperature**2 * (teacher * (teacher.log() - student.log())).sum(1).mean())


def objective_at(minilm, begun: State, task, method: MethodConfig, adapter: AdapterConfig):
    labels, data = task
    load_state(minilm, begun)
    local = LocalTask(labels, (SEEN,))
    return phase_of(method, adapter).objective(minilm, begun, local, data, Cache())


def test_the_loss_is_the_formula_over_the_labels_of_all_tasks(minilm, learnt, task):
    method = consolidating(temperature=3.0)
    begun = phase_of(method, REAL).setup(learnt)
    objective = objective_at(minilm, begun, task, method, REAL)
    with torch.no_grad():
        loss = float(objective.example_losses(range(len(task[1]))).mean())
    assert objective.penalty() is None
    assert loss == pytest.approx(divergence(minilm, begun, task, 3.0), rel=1e-3)
    assert loss > 1e-3


def gradient(minilm, objective, task) -> float:
    parameters = set_trainable(minilm.module, BOTH)
    for p in parameters:
        p.grad = None
    accumulate(objective, task[1], range(16), 10_000)
    size = sum(float(p.grad.square().sum()) for p in parameters) ** 0.5
    for p in parameters:
        p.grad = None
    return size


def test_a_student_that_holds_everything_has_nothing_to_learn(minilm, learnt, task):
    """Loss 0 and gradient 0 up to rounding, where the rank suffices."""
    wide, method = REAL.model_copy(update={"retained_rank": 12}), consolidating()
    sizes = {}
    for name, config in (("cut", REAL), ("whole", wide)):
        begun = phase_of(method, config).setup(learnt)
        objective = objective_at(minilm, begun, task, method, config)
        with torch.no_grad():
            loss = float(objective.example_losses(range(16)).mean())
        sizes[name] = loss, gradient(minilm, objective, task)
    assert sizes["whole"][0] < 1e-6 < 1e-3 < sizes["cut"][0]
    assert sizes["whole"][1] < 1e-2 * sizes["cut"][1]


def after_training(minilm, learnt, task, method: MethodConfig, rate: float = 1e-3) -> State:
    """The state after three epochs of one client."""
    phase = phase_of(method, REAL)
    begun = phase.setup(learnt)
    objective = objective_at(minilm, begun, task, method, REAL)
    trained = frozenset({"lora_B"}) if phase.rule == "ffa" else BOTH
    config = TrainConfig(learning_rate=rate)
    train(minilm, objective, task[1], trained, 3, config, seeded(0))
    return replace(begun, current=read(minilm.module))


@pytest.mark.parametrize(
    ("name", "rate", "left"), [("identity", 3e-4, 0.5), ("learned", 3e-2, 0.97)]
)
def test_clients_lower_the_divergence_on_their_data(minilm, learnt, task, name, rate, left):
    method = consolidating(name)
    before = phase_of(method, REAL).setup(learnt)
    after = after_training(minilm, learnt, task, method, rate)
    assert divergence(minilm, after, task) < left * divergence(minilm, before, task)
    kept = make_method(method, REAL).end_task(after)
    labels, data = task
    load_state(minilm, after)
    with torch.no_grad():
        unmerged = minilm.scores(data, labels)
        load_state(minilm, kept)
        merged = minilm.scores(data, labels)
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-3)


def test_a_learned_filter_only_scales_directions(minilm, learnt, task):
    method = consolidating("learned")
    before = phase_of(method, REAL).setup(learnt)
    after = after_training(minilm, learnt, task, method, 3e-2)
    changed = 0
    for name, f in after.current.layers.items():
        start = before.current.layers[name]
        assert torch.equal(f.A, start.A)
        ratio = (f.B * start.B).sum(0) / start.B.square().sum(0)
        torch.testing.assert_close(f.B, start.B * ratio, rtol=1e-3, atol=1e-5)
        changed += int(((ratio - 1).abs() > 1e-3).any())
    assert changed > 0


@pytest.mark.slow
def test_every_key_changes_the_numbers(minilm, learnt, task):
    """Of what is learnt: the filter, the temperature; of learned gains, each weight and power."""
    free = {"lambda1": 50.0, "lambda2": 50.0, "a": 3.0, "b": 2.0}
    variants = [
        consolidating(),
        consolidating("wiener"),
        consolidating(temperature=1.0),
        consolidating("learned", **free),
        consolidating("learned", **{**free, "lambda1": 0.0}),
        consolidating("learned", **{**free, "lambda2": 0.0}),
        consolidating("learned", **{**free, "a": 4.0}),
        consolidating("learned", **{**free, "b": 1.5}),
    ]
    name = next(iter(learnt.current.layers))
    few = task[0], task[1][:8]
    found = [
        after_training(minilm, learnt, few, each, 1e-2).current.layers[name].B for each in variants
    ]
    for i, first in enumerate(found):
        assert not any(torch.equal(first, other) for other in found[:i])


def test_a_heavy_penalty_holds_the_filter(minilm, learnt, task):
    """What the anchor is for: the gains stay where they started."""
    few = task[0], task[1][:8]
    start = phase_of(consolidating("learned"), REAL).setup(learnt).current
    moves = [
        relative_difference(
            after_training(
                minilm, learnt, few, consolidating("learned", lambda1=weight, lambda2=0.0), 1e-2
            ).current,
            start,
        )
        for weight in (0.0, 1e4)
    ]
    assert moves[1] < 0.7 * moves[0]
