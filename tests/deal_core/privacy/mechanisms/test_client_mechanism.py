"""Client-level privacy: what one client can move, how loud the noise is, and what it costs."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from deal_core.aggregation import ClientUpdate, make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, zero_adapter
from deal_core.models.interface import Encoded
from deal_core.privacy.accounting.client_plan import client_event
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.accounting.ledger_event import Budget, unprotected_event
from deal_core.privacy.interface import Permit, RecordId, Refusal, Site, UpdateRequest, release
from deal_core.privacy.mechanisms.central_dp import CentralDP
from deal_core.privacy.mechanisms.client import CentralDPClient, LocalDPClient, make_client
from deal_core.privacy.mechanisms.clipped_mean import ClippedSum, clipped, factors_of
from deal_core.privacy.mechanisms.noise import SecureNoise, SeededNoise
from deal_core.privacy.mechanisms.registry import make_mechanism, make_server_side
from deal_core.privacy.mechanisms.server_side import NoServerNoise, RoundContext
from deal_core.privacy.policy import Policy
from deal_core.randomness import seeded

SHAPES = {"one": (30, 20), "two": (10, 40)}
B = frozenset({"lora_B"})
BOUND = 0.5


def start() -> Adapter:
    return zero_adapter(SHAPES, 4, 2.0)


def update(fill: float | None = None, seed: int = 0) -> Adapter:
    """Of ``lora_B``, random or everywhere the same."""
    generator = seeded("update", seed)
    layers = {}
    for name, f in start().layers.items():
        own = torch.randn(f.B.shape, generator=generator)
        layers[name] = LoraFactors(f.A, own if fill is None else torch.full_like(own, fill))
    return Adapter(layers, 2.0)


def total(*updates: Adapter) -> torch.Tensor:
    """The sum without noise, as one vector."""
    summed = ClippedSum(start(), B, BOUND)
    for each in updates:
        summed.add(each)
    mean = summed.noisy_mean(0.0, 1.0, SeededNoise(seeded(0)))
    return torch.cat([part.flatten() for part in mean.values()])


ADVERSARIAL = [
    update(seed=9),
    update(1e8),
    update(-1e30),
    update(3e38),
    update(1e-30),
    update(math.inf),
    update(math.nan),
]


@pytest.mark.parametrize("worst", ADVERSARIAL)
@pytest.mark.parametrize("others", [0, 1, 5])
def test_one_client_moves_the_sum_by_at_most_the_bound(worst, others):
    """There or not, among others or alone; a client that drops out is one that is not there."""
    rest = [update(seed=k) for k in range(others)]
    difference = total(*rest, worst) - total(*rest)
    assert difference.isfinite().all()
    assert difference.norm() <= BOUND


def test_a_small_update_is_left_as_it_is_and_a_large_one_keeps_its_direction():
    small = {"x": torch.tensor([3e-3, 4e-3], dtype=torch.float64)}
    assert torch.equal(clipped(small, 1.0)["x"], small["x"])
    large = clipped({"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}, 1.0)
    assert torch.allclose(large["x"], torch.tensor([0.6, 0.0], dtype=torch.float64))
    assert torch.allclose(large["y"], torch.tensor([0.8], dtype=torch.float64))


@pytest.mark.parametrize("draw", range(200))
def test_rounding_does_not_take_a_clipped_change_past_its_bound(draw):
    """Float32 values whose length is within a few of the last digits of the bound, and long ones;
    lengths are compared as fractions."""
    values = torch.randn(1 + draw % 40, generator=seeded("near the bound", draw))
    wanted = BOUND * (1.0 + (draw % 7 - 3) * 2.0**-24) * (1.0 if draw % 2 else 1e3)
    near = {"x": (values.double() * wanted / values.double().norm()).float()}
    kept = [Fraction(value) for value in clipped(near, BOUND)["x"].tolist()]
    assert sum(value**2 for value in kept) <= Fraction(BOUND) ** 2


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="another shape"):
        ClippedSum(start(), B, BOUND).add(zero_adapter(SHAPES, 3, 2.0))


@pytest.mark.parametrize("noise", [SeededNoise(seeded(4)), SecureNoise()])
def test_the_noise_has_the_scale_that_is_charged(noise):
    shapes = {"wide": (50_000, 20)}
    before = zero_adapter(shapes, 4, 1.0)
    drawn = ClippedSum(before, B, BOUND).noisy_mean(1.7, 8.0, noise)["wide.lora_B"]
    assert drawn.numel() >= 1e5
    assert drawn.std().item() == pytest.approx(1.7 * BOUND / 8.0, rel=0.01)
    assert abs(drawn.mean().item()) < 0.01


CLIENT = (
    "privacy.mechanism=client",
    f"privacy.max_update_norm={BOUND}",
    "privacy.noise=seeded",
    "privacy.target_delta=1e-4",
    "federation.clients=40",
    "federation.clients_per_round=10",
)


@pytest.fixture
def side(make_experiment, tmp_path):
    return make_server_side(make_experiment(*CLIENT), 6, Ledger(tmp_path))


def played(
    side: CentralDP, server_round: int, updates: list[Adapter], eligible: int = 40
) -> torch.Tensor:
    rule = make_rule(AggregationConfig(rule="fedit"))
    round_ = side.begin(rule, start(), B, RoundContext("learn", 0, server_round, eligible))
    for k, each in enumerate(updates):
        round_.add(ClientUpdate(str(k), each, weight=1.0 + k))
    current = round_.finish().current
    return torch.cat([part.double().flatten() for part in factors_of(current, B).values()])


def test_the_denominator_is_fixed_and_weights_are_uniform(side):
    """By the same noise: two updates of three, the third having dropped out, are divided by the
    ten that were expected."""
    noise_alone = played(side, 1, [])
    fresh = CentralDP(side.experiment, side.rounds, Ledger(side.ledger.folder / "other"))
    two = played(fresh, 1, [update(seed=1), update(seed=2)])
    expected = total(update(seed=1), update(seed=2)) / 10
    assert torch.allclose(two - noise_alone, expected, atol=1e-6)


@pytest.mark.parametrize("eligible", [40, 10])
def test_the_floor_is_the_spread_of_the_noise_also_where_not_all_have_a_task(side, eligible):
    noise = torch.cat([played(side, n, [], eligible) for n in range(1, 7)])
    clients = [str(k) for k in range(40)]
    floor = side.spent(clients, eligible)["0"]["noise_floor"]
    spread = noise.std().item()
    assert floor / len(clients) ** 0.5 == pytest.approx(spread, rel=0.1)


def test_asked_again_the_same_round_is_the_same_and_charged_once(side):
    first = played(side, 1, [update(seed=1)])
    again = played(side, 1, [update(seed=2)])
    assert torch.equal(first, again)
    assert len(side.ledger.events()) == 1


def test_a_fault_of_the_servers_ledger_stops_the_run_with_one_line(side):
    """It is none of numbers, after which a run would go on."""
    played(side, 1, [update(seed=1)])
    played(side, 2, [update(seed=1)])
    side.ledger.head.unlink()
    for use in (lambda: played(side, 3, []), lambda: side.spent(["0"], 1)):
        with pytest.raises(UserError, match="is gone"):
            use()


def test_everyone_is_drawn_with_the_rate_that_is_charged(side):
    names = [str(k) for k in range(40)]
    drawn = [len(side.sample(names, 0, r)) for r in range(400)]
    assert sum(drawn) / (400 * 40) == pytest.approx(0.25, abs=0.015)
    assert len(set(drawn)) > 5  # not a fixed number
    assert side.sample_rate == 0.25


def test_epsilon_is_what_an_independent_accountant_says(side):
    for server_round in range(1, 7):
        played(side, server_round, [])
    spent = side.spent(["0", "1"], 40)
    assert spent["0"] == spent["1"]
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(side.plan.noise_multiplier, 0.25, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = accountant.get_epsilon(1e-4, eps_error=0.005)
    assert spent["0"]["epsilon"] == pytest.approx(expected, rel=0.01)
    assert 7.9 < spent["0"]["epsilon"] <= 8.0
    assert (spent["0"]["delta"], spent["0"]["simulation_only"]) == (1e-4, 1.0)
    event = side.ledger.events()[0]
    assert (event.mechanism, event.unit, event.steps) == ("client", "client", 1)


def test_beyond_the_plan_nothing_is_released(side):
    for server_round in range(1, 7):
        played(side, server_round, [])
    with pytest.raises(UserError, match="budget is spent"):
        played(side, 7, [])
    assert len(side.ledger.events()) == 6


def test_noise_is_secure_unless_a_seed_is_asked_for(make_experiment, tmp_path):
    experiment = make_experiment(*CLIENT, "privacy.noise=auto")
    side = make_server_side(experiment, 6, Ledger(tmp_path))
    first = played(side, 1, [])
    fresh = make_server_side(experiment, 6, Ledger(tmp_path / "other"))
    assert not torch.allclose(first, played(fresh, 1, []))
    assert not side.ledger.events()[0].simulation_only


def test_who_trusts_the_server_leaves_the_noise_to_it(make_experiment, tmp_path):
    trusting, wary = (
        make_experiment(*CLIENT, f"privacy.trusted_server={word}") for word in ("true", "false")
    )
    assert isinstance(make_client(trusting), CentralDPClient)
    assert isinstance(make_client(wary), LocalDPClient)
    assert isinstance(make_server_side(wary, 6, Ledger(tmp_path)), NoServerNoise)


def asked(records: int = 8) -> UpdateRequest:
    return UpdateRequest(
        request="r",
        client="0",
        task="t",
        phase="learn",
        stage=0,
        server_round=1,
        data=[Encoded((1, 2), 0)] * records,
        record_ids=[RecordId("t", row) for row in range(records)],
        records=lambda: {"t": records},
        site_records=lambda: records,
        generator=seeded(0),
        ids=lambda: (),
        learning_rate=2e-3,
    )


def never(gradients):
    raise AssertionError("it has trained")


@pytest.mark.parametrize("limit", [{"max_epsilon": 2.0}, {"max_delta": 1e-6}])
def test_a_site_with_limits_of_its_own_trusts_no_server(make_experiment, tmp_path, limit):
    policy = Policy(mechanism="client", trusted_server=True, **limit)
    site = Site(lambda: Ledger(tmp_path), policy, simulated=True)
    with pytest.raises(Refusal, match="the server accounts") as caught:
        release(make_client(make_experiment(*CLIENT)), asked(), site, never)
    assert caught.value.code == "policy"


def test_what_has_hidden_records_alone_hid_no_client(make_experiment, tmp_path, side):
    ledger = Ledger(tmp_path / "site")
    event = client_event(side.experiment, 1.0, 5.0, 1e-4)
    ledger.charge(replace(event, unit="record"), Budget(50.0, 1e-4), "earlier", b"")
    wary = make_experiment(*CLIENT, "privacy.trusted_server=false")
    with pytest.raises(Refusal) as caught:
        release(make_client(wary), asked(), Site(lambda: ledger, None, simulated=True), never)
    assert caught.value.code == "policy"
    assert len(ledger.events()) == 1


@pytest.mark.parametrize(("left", "allowed"), [("clear-counts", True), ("none", False)])
def test_counts_in_the_clear_are_of_test_records_and_stop_nothing(
    make_experiment, tmp_path, left, allowed
):
    """A first training request carries an evaluation along, and a site notes its counts."""
    ledger = Ledger(tmp_path)
    ledger.note(unprotected_event("run", left, ("", "evaluate", -1, 0)))
    wary = make_client(make_experiment(*CLIENT, "privacy.trusted_server=false"))
    site = Site(lambda: ledger, None, simulated=False)
    if allowed:
        permit = wary.permit(asked(), site)
        assert isinstance(permit, Permit)
        return
    with pytest.raises(Refusal) as caught:
        wary.permit(asked(), site)
    assert caught.value.code == "policy"


def test_a_client_whose_budget_is_spent_is_refused_before_it_trains(make_experiment, tmp_path):
    wary = make_experiment(*CLIENT, "privacy.trusted_server=false")
    ledger = Ledger(tmp_path)
    spent = client_event(wary, 1.0, 0.5, 1e-4)
    ledger.charge(spent, Budget(50.0, 1e-4), "earlier", b"")
    with pytest.raises(Refusal) as caught:
        release(make_client(wary), asked(), Site(lambda: ledger, None, simulated=True), never)
    assert caught.value.code == "budget-spent"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("aggregation.robust=cosine-norm", "no single update"),
        ("adapter.client_ranks=[4]", "one shape"),
        ("aggregation.secure=true", "would have to clip every client's update"),
    ],
)
def test_what_cannot_be_protected_is_refused(make_experiment, override, told):
    with pytest.raises(UserError, match=told) as caught:
        make_mechanism(make_experiment(*CLIENT, override))
    assert "\n" not in str(caught.value)
