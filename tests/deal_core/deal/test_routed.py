"""Components against dense formulas: what is kept apart, cut and merged."""

from dataclasses import replace

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, MethodConfig, RetentionConfig
from deal_core.deal.routed import (
    THINNEST,
    Kept,
    RoutedDeal,
    fitted,
    holding,
    kept_components,
    likeness,
    merge,
)
from deal_core.lora.adapter import (
    compress,
    relative_difference,
    spectrum,
    stack,
    zero_adapter,
)
from deal_core.lora.state import State

SVD, WAVELET = RetentionConfig(), RetentionConfig(filter="wavelet")
SHAPES = {"first": (40, 50), "second": (60, 45)}


def fresh_state():
    return State(zero_adapter(SHAPES, 4, 2.0), zero_adapter(SHAPES, 1))


@pytest.fixture
def kept(random_adapter):
    def make(task, rank=4, seed=0):
        return Kept((task,), compress(random_adapter(SHAPES, rank, 1.0, seed), rank))

    return make


def dense(adapter):
    return torch.cat(
        [(adapter.scaling * f.B @ f.A).double().flatten() for f in adapter.layers.values()]
    )


def test_components_come_back_as_they_were_put_in(kept):
    bank = [kept("a", 4, 1), kept("b", 2, 2), kept("c", 3, 3)]
    state = holding(fresh_state(), bank)
    assert state.retained.rank == 9
    assert [each.rank for each in state.components] == [4, 2, 3]
    for place, (was, now) in enumerate(zip(bank, kept_components(state), strict=True)):
        assert now.tasks == was.tasks
        assert torch.equal(dense(now.adapter), dense(was.adapter))
        assert torch.equal(dense(state.view(place).retained), dense(was.adapter))
    assert state.place_of("b") == 1
    assert state.place_of("d") is None
    assert not dense(state.view(None).retained).any()


def test_what_fits_is_kept_to_the_bit(kept):
    bank = [kept("a", 4, 1), kept("b", 4, 2)]
    assert all(now is was for now, was in zip(fitted(bank, 8, SVD), bank, strict=True))


def test_beyond_the_budget_the_weakest_direction_of_all_goes_first(random_adapter):
    """Each component loses what carries the least of it, so no task pays for all."""
    strong = Kept(("a",), compress(random_adapter(SHAPES, 4, 1.0, 1), 4))
    layers = {
        name: replace(f, A=f.A * torch.tensor([1.0, 0.1, 0.1, 0.01])[:, None])
        for name, f in compress(random_adapter(SHAPES, 4, 100.0, 2), 4).layers.items()
    }
    weak = Kept(("b",), replace(strong.adapter, layers=layers))
    first, second = fitted([strong, weak], 7, SVD)
    assert (first.adapter.rank, second.adapter.rank) == (4, 3)
    first, second = fitted([strong, weak], 6, SVD)
    assert (first.adapter.rank, second.adapter.rank) == (4, THINNEST)
    # The best approximation of its rank (Eckart-Young): the rest is what was cut.
    best = compress(weak.adapter, THINNEST)
    assert relative_difference(second.adapter, best) < 1e-5


def test_the_size_is_constant_however_many_tasks_there_are(kept):
    bank = []
    for number in range(20):
        bank = fitted([*bank, kept(f"task {number}", 4, number)], 12, SVD)
        assert sum(each.adapter.rank for each in bank) <= 12
        assert sorted(task for each in bank for task in each.tasks) == sorted(
            f"task {n}" for n in range(number + 1)
        )


def test_the_two_most_alike_become_one(kept):
    a, b = kept("a", THINNEST, 1), kept("b", THINNEST, 2)
    twin = Kept(("twin",), replace(a.adapter, scaling=1.1))
    merged = fitted([a, b, twin], 2 * THINNEST, SVD)
    assert [each.tasks for each in merged] == [("b",), ("a", "twin")]
    mean = (dense(a.adapter) + dense(twin.adapter)) / 2
    assert torch.allclose(dense(merged[1].adapter), mean, atol=1e-5)


def test_the_last_component_stays_the_last_where_others_become_one(kept):
    """The next task begins with a copy of it."""
    a, b = kept("a", THINNEST, 1), kept("b", THINNEST, 2)
    merged = fitted([a, Kept(("twin",), a.adapter), b], 2 * THINNEST, SVD)
    assert [each.tasks for each in merged] == [("a", "twin"), ("b",)]


def test_a_merged_component_counts_each_of_its_tasks(kept):
    a, b, c = (kept(name, 2, seed) for seed, name in enumerate("abc"))
    all_three = merge(merge(Kept(("a",), a.adapter), b, SVD), c, SVD)
    exact = compress(
        stack(
            [
                replace(merge(a, b, SVD).adapter, scaling=2 / 3),
                replace(c.adapter, scaling=c.adapter.scaling / 3),
            ]
        ),
        2,
    )
    assert torch.allclose(dense(all_three.adapter), dense(exact), atol=1e-6)


def test_where_two_become_one_the_filter_takes_what_is_beyond_for_noise(kept):
    """Two unlike ones of rank 4 leave four directions over, whose median is the noise floor: the
    wavelet keeps the directions of the plain cut, and each of them shorter."""
    a, b = kept("a", 4, 1), kept("b", 4, 2)
    plain, filtered = (merge(a, b, each).adapter for each in (SVD, WAVELET))
    for name in SHAPES:
        whole, left = (spectrum(each.layers[name], each.scaling) for each in (plain, filtered))
        gains = left.S[:4] / whole.S[:4]
        assert bool(((gains > 0) & (gains < 0.95)).all())
        assert torch.allclose((left.U[:, :4] * whole.U[:, :4]).sum(0).abs(), torch.ones(4).double())


def test_likeness_is_the_cosine_of_the_dense_updates(random_adapter):
    first, second = random_adapter(SHAPES, 4, 0.5, 1), random_adapter(SHAPES, 3, 2.0, 2)
    both = stack([first, second])
    wanted = torch.cosine_similarity(dense(first), dense(both), dim=0)
    assert likeness(first, both) == pytest.approx(float(wanted), abs=1e-6)
    assert likeness(first, zero_adapter(SHAPES, 2)) == 0.0


def routed(limit=16):
    return RoutedDeal(AdapterConfig(rank=4, lora_alpha=8, retained_rank=limit), MethodConfig())


def learn(method, state, tasks, adapter):
    begun = method.begin_task(state, torch.Generator().manual_seed(0), tasks)
    taught = replace(begun, current=replace(adapter, scaling=begun.current.scaling))
    return method.end_task(taught, tasks)


def test_what_a_task_taught_is_answered_with_whatever_comes_later(random_adapter):
    method, state = routed(), fresh_state()
    taught = {}
    for seed, task in enumerate("abcd"):
        taught[task] = random_adapter(SHAPES, 4, 2.0, seed)
        state = learn(method, state, (task,), taught[task])
    for task, adapter in taught.items():
        place = state.place_of(task)
        assert place is not None
        assert relative_difference(state.view(place).retained, adapter) < 1e-5


def test_a_task_begins_with_a_copy_of_the_last_component(random_adapter):
    method, begun = routed(), fresh_state()
    begun = method.begin_task(begun, torch.Generator().manual_seed(0), ("a",))
    assert not dense(begun.current).any()
    first, last = (random_adapter(SHAPES, 4, 2.0, seed) for seed in (1, 2))
    state = learn(method, learn(method, fresh_state(), ("a",), first), ("b",), last)
    begun = method.begin_task(state, torch.Generator().manual_seed(0), ("c",))
    assert begun.current.rank == 4
    assert begun.current.scaling == 2.0
    assert relative_difference(begun.current, last) < 1e-5
    assert begun.components == state.components


def test_a_task_that_returns_goes_on_with_its_component(random_adapter):
    method, adapter = routed(), random_adapter(SHAPES, 4, 2.0, 1)
    state = learn(method, fresh_state(), ("a",), adapter)
    state = learn(method, state, ("b",), random_adapter(SHAPES, 4, 2.0, 2))
    begun = method.begin_task(state, torch.Generator().manual_seed(0), ("a",))
    assert begun.current.rank == 4
    assert begun.current.scaling == 2.0
    assert relative_difference(begun.current, adapter) < 1e-5
    assert [each.tasks for each in begun.components] == [("b",)]
    again = method.end_task(begun, ("a",))
    assert relative_difference(again.view(again.place_of("a")).retained, adapter) < 1e-5


def test_a_copy_of_more_than_the_rank_of_an_adapter_is_one_with_the_rest_beside_it(random_adapter):
    """A residual, of an exact rule, makes a component of more directions; clients know the scaling
    of an adapter by its rank."""
    method, parts = routed(), [random_adapter(SHAPES, 4, 2.0, 1), random_adapter(SHAPES, 3, 1.0, 2)]
    begun = method.begin_task(fresh_state(), torch.Generator().manual_seed(0), ("a",))
    taught = method.end_task(replace(begun, current=parts[0], residual=parts[1]), ("a",))
    assert taught.components[0].rank == 7
    for task in ("a", "b"):
        begun = method.begin_task(taught, torch.Generator().manual_seed(0), (task,))
        assert (begun.current.rank, begun.current.scaling) == (4, 2.0)
        learnt = stack([begun.current, begun.residual])
        assert relative_difference(learnt, stack(parts)) < 1e-5


def test_a_task_that_returns_goes_on_with_the_component_that_it_shares(kept):
    shared, last = Kept(("a", "b"), kept("a", 4, 1).adapter), kept("c", 4, 2)
    state = holding(fresh_state(), [shared, last])
    begun = routed().begin_task(state, torch.Generator().manual_seed(0), ("a",))
    assert relative_difference(begun.current, shared.adapter) < 1e-5
    assert begun.components == state.components
    again = routed().end_task(begun, ("a",))
    assert [each.tasks for each in again.components] == [("b",), ("c",), ("a",)]
