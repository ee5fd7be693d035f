"""Every rule against a dense float64 oracle, over random federations and both layouts."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.aggregation.rule import LORA_A, LORA_B, ClientUpdate
from deal_core.aggregation.rules import AGGREGATION_RULES, make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.updates import dense as delta

EXACT = ("ffa", "flora", "fedex")
MIXED = ("flora",)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Round:
    """One random round: its start and the replies."""

    before: Adapter
    updates: tuple[ClientUpdate, ...]


def factors(rank, shape, generator, size=1.0):
    d_out, d_in = shape
    return LoraFactors(
        size * torch.randn(rank, d_in, generator=generator),
        size * torch.randn(d_out, rank, generator=generator),
    )


def moved(start, drift, trained):
    return LoraFactors(
        start.A + drift.A if LORA_A in trained else start.A,
        start.B + drift.B if LORA_B in trained else start.B,
    )


@st.composite
def rounds(draw, name, ranks=None):
    """Draw a federation; ``ranks``: clients choose theirs and start from nothing in common."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    side = st.integers(1, 24)
    square = side.map(lambda d: (d, d))
    shapes = draw(st.lists(st.one_of(st.tuples(side, side), square), min_size=1, max_size=3))
    rank, alpha = draw(st.integers(1, 8)), draw(st.sampled_from([1.0, 8.0, 16.0]))
    clients = draw(st.integers(1, 50))
    size, new = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.booleans())
    start = {f"layer{i}": factors(rank, shape, generator) for i, shape in enumerate(shapes)}
    if new:
        start = {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in start.items()}
    before = Adapter(start, alpha / rank)
    trained = AGGREGATION_RULES[name].trained
    updates = []
    for k, dice in enumerate(torch.rand(clients, 2, generator=generator).tolist()):
        own = ranks[int(dice[0] * len(ranks))] if ranks else rank
        drift = {n: factors(own, shape, generator, size) for n, shape in before.shapes.items()}
        layers = drift if ranks else {n: moved(start[n], drift[n], trained) for n in start}
        updates.append(ClientUpdate(f"c{k}", Adapter(layers, alpha / own), 10 ** (6 * dice[1] - 3)))
    return Round(before, tuple(updates))


def run(name, task, **options):
    rule = make_rule(AggregationConfig(rule=name, **options))
    aggregation = rule.begin(task.before)
    for update in task.updates:
        aggregation.add(update)
    return aggregation.finish()


def oracle(updates):
    """The ideal update, dense and plain: ``sum_i p_i s_i B_i A_i``, shape ``(d_out, d_in)``."""
    total = sum(update.weight for update in updates)
    ideal = {}
    for name in updates[0].adapter.layers:
        ideal[name] = sum(
            u.weight
            / total
            * u.adapter.scaling
            * (
                u.adapter.layers[name].B.double().numpy()
                @ u.adapter.layers[name].A.double().numpy()
            )
            for u in updates
        )
    return ideal


def dense(result, name):
    """What the result adds to a base weight."""
    parts = [result.current] + ([result.residual] if result.residual else [])
    return sum(delta(part, name).numpy() for part in parts)


def relative(result, ideal):
    gap = sum(np.square(dense(result, name) - want).sum() for name, want in ideal.items())
    size = sum(np.square(want).sum() for want in ideal.values())
    return float(np.sqrt(gap / size)) if size else float(gap > 0)


@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_equal_the_dense_oracle(name):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(rounds(name))
    def check(task):
        result = run(name, task)
        assert relative(result, oracle(task.updates)) < 1e-5
        assert result.error < 1e-5
        assert all(f.A.dtype == f.B.dtype == torch.float32 for f in result.current.layers.values())
        assert result.current.shapes == task.before.shapes
        assert result.current.rank == task.before.rank

    check()


@pytest.mark.parametrize("name", MIXED)
def test_mixed_ranks_are_exact(name):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(rounds(name, ranks=(2, 4, 8, 16)))
    def check(task):
        result = run(name, task)
        assert relative(result, oracle(task.updates)) < 1e-5
        assert result.error < 1e-5

    check()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rounds("fedit"))
def test_fedit_misses_exactly_the_covariance_of_the_drifts(task):
    result, ideal = run("fedit", task), oracle(task.updates)
    total = sum(u.weight for u in task.updates)
    size = np.sqrt(sum(np.square(want).sum() for want in ideal.values()))
    square = 0.0
    for name, want in ideal.items():
        a = [u.adapter.layers[name].A.double().numpy() for u in task.updates]
        b = [u.adapter.layers[name].B.double().numpy() for u in task.updates]
        p = [u.weight / total for u in task.updates]
        mean_a = sum(w * x for w, x in zip(p, a, strict=True))
        mean_b = sum(w * x for w, x in zip(p, b, strict=True))
        covariance = task.before.scaling * sum(
            w * (y - mean_b) @ (x - mean_a) for w, x, y in zip(p, a, b, strict=True)
        )
        assert np.linalg.norm(want - dense(result, name) - covariance) < 1e-5 * size
        square += np.square(covariance).sum()
    assert result.error == pytest.approx(np.sqrt(square) / size, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", sorted(AGGREGATION_RULES))
def test_order_of_clients_changes_nothing(name):
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(rounds(name), st.randoms(use_true_random=False))
    def check(task, random):
        shuffled = list(task.updates)
        random.shuffle(shuffled)
        first, second = run(name, task), run(name, Round(task.before, tuple(shuffled)))
        size = np.sqrt(sum(np.square(dense(first, n)).sum() for n in task.before.layers))
        gap = sum(np.square(dense(first, n) - dense(second, n)).sum() for n in task.before.layers)
        scale = max(size, np.sqrt(sum(np.square(w).sum() for w in oracle(task.updates).values())))
        assert np.sqrt(gap) <= 1e-6 * scale

    check()


@pytest.mark.parametrize("name", sorted(AGGREGATION_RULES))
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_one_client_and_equal_clients_are_the_identity(name, count):
    generator = torch.Generator().manual_seed(count)
    before = Adapter({"a": factors(4, (9, 15), generator), "b": factors(4, (8, 8), generator)}, 2.0)
    trained = make_rule(AggregationConfig(rule=name)).trained
    layers = {
        n: moved(start, factors(4, before.shapes[n], generator), trained)
        for n, start in before.layers.items()
    }
    updates = tuple(ClientUpdate(f"c{k}", Adapter(layers, 2.0), 1.0 + k) for k in range(count))
    result = run(name, Round(before, updates))
    assert relative(result, oracle(updates[:1])) < 1e-6
    assert result.error < 1e-6
    if name not in MIXED:
        assert result.residual is None


def test_average_of_two_clients_by_hand():
    """``A = [1 0]``; weights 1 and 3; ``B = (4, 0)`` and ``(0, 8)``; scaling 2: mean (1, 6)."""
    a = torch.tensor([[1.0, 0.0]])
    before = Adapter({"q": LoraFactors(a, torch.zeros(2, 1))}, 2.0)
    replies = ([[4.0], [0.0]], 1.0), ([[0.0], [8.0]], 3.0)
    updates = tuple(
        ClientUpdate(str(w), Adapter({"q": LoraFactors(a, torch.tensor(b))}, 2.0), w)
        for b, w in replies
    )
    for name in AGGREGATION_RULES:
        result = run(name, Round(before, updates))
        assert dense(result, "q").tolist() == pytest.approx(np.array([[2.0, 0], [12.0, 0]]))
    result = run("ffa", Round(before, updates))
    assert result.current.layers["q"].B.tolist() == [[1.0], [6.0]]


@pytest.mark.parametrize("name", sorted(AGGREGATION_RULES))
def test_weights_count_only_by_their_share_and_scaling_is_linear(name):
    generator = torch.Generator().manual_seed(3)
    trained = make_rule(AggregationConfig(rule=name)).trained
    start = {"q": factors(3, (7, 11), generator)}
    layers = [{"q": moved(start["q"], factors(3, (7, 11), generator), trained)} for _ in range(4)]

    def result(scaling, unit):
        updates = (
            ClientUpdate(f"c{k}", Adapter(x, scaling), unit * (k + 1)) for k, x in enumerate(layers)
        )
        return run(name, Round(Adapter(start, scaling), tuple(updates)))

    plain, doubled, heavier = result(0.5, 1.0), result(1.0, 1.0), result(0.5, 1e4)
    np.testing.assert_allclose(dense(doubled, "q"), 2 * dense(plain, "q"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dense(heavier, "q"), dense(plain, "q"), rtol=1e-4, atol=1e-5)


def test_a_new_adapter_can_still_learn():
    generator = torch.Generator().manual_seed(5)
    new = Adapter({"q": LoraFactors(factors(4, (9, 12), generator).A, torch.zeros(9, 4))}, 2.0)
    result = run("flora", Round(new, (ClientUpdate("c", new, 1.0),)))
    assert torch.linalg.matrix_rank(result.current.layers["q"].A) == 4
    assert not result.current.layers["q"].B.any()
    assert result.error == 0.0


@pytest.mark.parametrize("name", sorted(AGGREGATION_RULES))
def test_what_does_not_fit_is_refused_and_leaves_no_trace(name):
    generator = torch.Generator().manual_seed(7)
    before = Adapter({"q": factors(2, (5, 5), generator)}, 2.0)
    aggregation = make_rule(AggregationConfig(rule=name)).begin(before)
    with pytest.raises(ValueError, match="no client update"):
        make_rule(AggregationConfig(rule=name)).begin(before).finish()
    good = before.layers["q"]
    bad = [
        (before, 0.0),
        (before, -1.0),
        (before, float("nan")),
        (before, float("inf")),
        (Adapter({"k": good}, 2.0), 1.0),
        (Adapter({"q": good, "k": good}, 2.0), 1.0),
        (Adapter({"q": good}, float("nan")), 1.0),
        (Adapter({"q": LoraFactors(good.A[:, :4], good.B)}, 2.0), 1.0),
        (Adapter({"q": LoraFactors(good.A, good.B[:1])}, 2.0), 1.0),
        (Adapter({"q": LoraFactors(good.A.T, good.B.T)}, 2.0), 1.0),
        (Adapter({"q": LoraFactors(good.A[:1], good.B)}, 2.0), 1.0),
        (Adapter({"q": LoraFactors(good.A[:0], good.B[:, :0])}, 2.0), 1.0),
    ]
    if name not in MIXED:
        bad.append((Adapter({"q": good}, 1.0), 1.0))
        bad.append((Adapter({"q": LoraFactors(good.A[:1], good.B[:, :1])}, 2.0), 1.0))
    if name == "ffa":
        bad.append((Adapter({"q": LoraFactors(good.A + 1, good.B)}, 2.0), 1.0))
    for adapter, weight in bad:
        with pytest.raises(ValueError, match="client eve"):
            aggregation.add(ClientUpdate("eve", adapter, weight))
    aggregation.add(ClientUpdate("alice", before, 1.0))
    assert aggregation.finish().error < 1e-6


@pytest.mark.parametrize("name", MIXED)
def test_a_client_has_one_rank_in_all_layers(name):
    generator = torch.Generator().manual_seed(9)
    before = Adapter({n: factors(4, (5, 6), generator) for n in ("q", "v")}, 2.0)
    uneven = Adapter({"q": factors(2, (5, 6), generator), "v": factors(3, (5, 6), generator)}, 2.0)
    with pytest.raises(ValueError, match="client eve, layer v"):
        make_rule(AggregationConfig(rule=name)).begin(before).add(ClientUpdate("eve", uneven, 1.0))


def test_where_a_is_trained_a_changed_b_is_refused():
    generator = torch.Generator().manual_seed(8)
    before = Adapter({"q": factors(2, (5, 5), generator)}, 2.0)
    changed = Adapter({"q": LoraFactors(before.layers["q"].A, before.layers["q"].B + 1)}, 2.0)
    aggregation = make_rule(AggregationConfig(rule="ffa-a")).begin(before)
    with pytest.raises(ValueError, match="lora_B changed"):
        aggregation.add(ClientUpdate("eve", changed, 1.0))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match=r"known: .*fedex.*did you mean 'fedex'"):
        make_rule(AggregationConfig(rule="fedexx"))
    with pytest.raises(UserError, match=r"known: .*cosine-norm"):
        make_rule(AggregationConfig(robust="krum"))
