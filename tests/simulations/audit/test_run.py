"""Audited trainings: real apps, real mechanism, real accountant."""

import io

import pytest
import torch
from rich.console import Console

from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.noise import SeededNoise
from simulations.audit import command
from simulations.audit.canaries import GradientCanaries
from simulations.audit.claim import Guesses, claim_p_value, lower_bound
from simulations.audit.command import Audit, AuditedCell, attack_table, claims, run_audit
from simulations.audit.run import Found, alone, carry_out, share_of

AUDITED = (
    'data.tasks=["laboratory"]',
    "federation.participants=[0]",
    "federation.rounds=1",
    "train.precision=float32",
    "data.max_test=8",
    "train.batch_size=64",
    "privacy.target_delta=1e-5",
    "privacy.mechanism=record",
    "privacy.sample_rate=0.5",
)


def trained(make_experiment, *overrides):
    experiment = make_experiment(*AUDITED, *overrides)
    return carry_out(experiment, 0, GradientCanaries(250, 5), 8, lambda event: None)


def test_noise_switched_off_is_caught(make_experiment, monkeypatch):
    """The accountant still says epsilon = 1; the updates tell otherwise."""
    monkeypatch.setattr(
        SeededNoise, "normal", lambda self, shape: torch.zeros(shape, dtype=torch.float64)
    )
    found = trained(make_experiment, "privacy.target_epsilon=1.0")
    assert 0.9 < found.claimed <= 1.0
    assert lower_bound([found], found.delta).epsilon > 2 * found.claimed
    assert claim_p_value([found]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_mechanism_as_it_is_stays_below_its_claim(make_experiment, epsilon):
    found = trained(make_experiment, f"privacy.target_epsilon={epsilon}")
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert lower_bound([found], found.delta).epsilon < found.claimed
    assert claim_p_value([found]) > 0.05


@pytest.mark.slow
def test_canaries_change_no_claim(make_experiment):
    """They are charged what the site's records would be: with the rate that it has without them."""
    config = make_experiment(*AUDITED, "privacy.sample_rate=0")
    found = carry_out(config, 0, GradientCanaries(250, 5), 8, lambda event: None)
    [spent] = found.spent
    assert spent.sample_rate == min(1.0, 64 / len(share_of(config, "laboratory", 0).train))
    assert spent.steps == -(-1 // spent.sample_rate)


SUMMED = (
    'data.tasks=["laboratory"]',
    'adapter.kind="pooled"',
    "aggregation.secure=true",
    "federation.clients=3",
    "federation.rounds=2",
    "train.step=server",
    "train.precision=float32",
    "data.max_test=8",
    "privacy.target_delta=1e-5",
    "privacy.target_epsilon=4.0",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
)


def summed(make_experiment):
    experiment = make_experiment(*SUMMED)
    return carry_out(experiment, 1, GradientCanaries(400, 5), 4, lambda event: None)


def test_noise_in_the_sum_stays_below_its_claim_and_says_whom_it_trusts(make_experiment):
    found = summed(make_experiment)
    assert 3.6 < found.claimed <= 4.0
    assert [(s.sample_rate, s.steps) for s in found.spent] == [(1.0, 2)]
    assert found.assumes.startswith("all sites but 1, which may pool what they know")
    bound, p = lower_bound([found], found.delta), claim_p_value([found])
    assert 0.5 < bound.epsilon < found.claimed
    cell = AuditedCell(epsilon="4", p_value=p, bound=bound, trainings=[found])
    assert not cell.refuted
    assert attack_table(Audit(experiment="it", cells=[cell])).rows[0][1] == "1 × 400"
    assert claims(found).endswith(f"if these are honest: {found.assumes}.")


def test_shares_that_are_too_small_are_caught(make_experiment, monkeypatch):
    """Each site adds a tenth of the variance that it is counted on for; the ledgers know nothing of
    it."""
    monkeypatch.setattr("deal_core.protection.shares_of", lambda experiment: 20)
    found = summed(make_experiment)
    assert 3.6 < found.claimed <= 4.0
    assert claim_p_value([found]) < 0.05


def test_a_sum_that_a_site_is_missing_from_is_no_audit(make_experiment, monkeypatch):
    """Where the attacked one cannot read its records, noise alone leaves it."""
    total = NoisySum.total

    def failing(self, module, objective):
        if len(self.record_ids) > 400:  # the attacked site's, canaries included
            raise RuntimeError("broken")
        return total(self, module, objective)

    monkeypatch.setattr(NoisySum, "total", failing)
    with pytest.raises(UserError, match="saw no whole sums"):
        summed(make_experiment)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "scale"), [("1", 0.5), ("8", 0.25), ("1", 1.0), ("8", 1.0)])
def test_the_command_refutes_too_little_noise_and_nothing_else(
    tmp_path, monkeypatch, epsilon, scale
):
    """The sizes that ``deal audit`` has by default, on the experiment that is shipped for it."""
    drawn = SeededNoise.normal
    monkeypatch.setattr(SeededNoise, "normal", lambda self, shape: scale * drawn(self, shape))
    out = tmp_path / "audit"
    code = run_audit("private-site", out, Console(file=io.StringIO()), epsilon=epsilon)
    [cell] = Audit.model_validate_json((out / "audit.json").read_text()).cells
    assert cell.claimed <= float(epsilon)
    assert code == (1 if scale < 1 else 0)
    assert cell.refuted == (scale < 1)


SIGMA = {1.0: 3.73, 8.0: 0.6}
"""Epsilon at delta 1e-5 to the noise of one step on all records."""


def as_if_trained(epsilon, client, share):
    """As if it had been trained, and so many of all guesses were right."""
    return Found(
        client=client,
        in_sum=False,
        unit="record",
        simulation_only=True,
        claimed=epsilon,
        delta=1e-5,
        spent=(DpEvent(1.0, SIGMA[epsilon], 1),),
        outcomes=tuple(Guesses(400, n, round(share * n)) for n in (20, 80, 400, 40)),
    )


@pytest.fixture
def audited(monkeypatch, tmp_path):
    """What the command does where so many of all guesses are right: its exit code, what it prints,
    its figures, and the trainings that it asks for."""
    monkeypatch.setattr(command, "preflight", lambda experiment, say: None)

    def run(name, epsilon, share=0.5, **asked):
        trainings = []

        def carry(experiment, client, canaries, records, listener):
            trainings.append((experiment, client, canaries, records))
            return as_if_trained(experiment.privacy.target_epsilon, client, share)

        monkeypatch.setattr(command, "carry_out", carry)
        screen = Console(file=io.StringIO(), width=200)
        code = run_audit(name, tmp_path, screen, epsilon=epsilon, **asked)
        audit = Audit.model_validate_json((tmp_path / "audit.json").read_text())
        return code, screen.file.getvalue(), audit, trainings

    return run


def test_every_budget_with_repetitions_of_one_site_and_guesses_that_refute_nothing(audited):
    asked = {"client": 1, "repetitions": 2, "share": 0.53}
    code, screen, audit, trainings = audited("quickstart", "1,8", **asked)
    asked = [(e.privacy.target_epsilon, c.repeat) for e, _, c, _ in trainings]
    assert asked == [(1.0, 0), (1.0, 1), (8.0, 0), (8.0, 1)]
    assert {(client, c.count, records) for _, client, c, records in trainings} == {(1, 2000, 32)}
    with alone(trainings[1][0], 1, 1) as config:
        assert config.federation.participants == (1,)
        assert config.privacy.target_delta == 1e-5
        assert (config.wire.dtype, config.run.workers) == ("float32", 1)
        assert config.run.seed == 1  # noise of its own
    assert code == 0
    assert [cell.epsilon for cell in audit.cells] == ["1", "8"]
    told = " ".join(screen.split())
    for part in ("delta = 1e-05 per record", "all rounds and tasks", "the server included"):
        assert part in told
    rows = [" ".join(line.split()) for line in screen.splitlines()]
    (row,) = [row for row in rows if row.startswith("1 2 × 400")]
    assert row.endswith(" not refuted")
    assert "REFUTED" not in screen
    assert "Simulation only" in screen
    assert all(cell.bound.epsilon < cell.claimed for cell in audit.cells)


def test_guesses_that_a_claim_does_not_allow_fail_the_command(audited):
    code, screen, audit, _ = audited("quickstart", "1", 0.75, repetitions=2)
    assert code == 1
    assert screen.count("REFUTED") == 1
    assert audit.cells[0].p_value < 0.05
    assert audit.cells[0].bound.epsilon > audit.cells[0].claimed


def test_noise_in_a_sum_is_attacked_through_the_sum_with_all_sites(audited):
    *_, [(experiment, _, canaries, _)] = audited("private", "8", client=3, repetitions=1)
    # Two rows learn where a task has three labels; two of their 384 entries each are a canary's.
    assert canaries.count == 2 * 384 // 2
    assert command._with_room(experiment, 100) == 100
    with alone(experiment, 3) as config:
        assert config.federation.participants == ()
        assert config.aggregation.secure


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"client": 9}, "clients 0 to"),
        ({"epsilon": "0"}, "--epsilon"),
        ({"epsilon": "8,inf"}, "no claim to test"),
        ({"overrides": ("stream.schedule=per-client",)}, "synchronous"),
        ({"overrides": ("privacy.disjoint_tasks=true",)}, "canaries are in every task"),
        ({"name": "private-sums"}, "'prototype' adds up embeddings"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path, wrong, told):
    asked = {"name": "quickstart", "folder": tmp_path / "out", **wrong}
    with pytest.raises(UserError, match=told):
        run_audit(console=Console(file=io.StringIO()), **asked)
    assert not (tmp_path / "out").exists()
