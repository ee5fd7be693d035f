"""Sites that make the noise of a sum together, and a server that tells some of them to add less."""

import pytest

from deal_core.errors import UserError
from deal_core.models import adapter_shapes
from deal_core.models.interface import Encoded
from deal_core.privacy.interface import LocalUpdate, RecordId, Site, UpdateRequest
from deal_core.privacy.ledger import Ledger
from deal_core.protection import MECHANISMS, sum_terms
from deal_core.wire.instruction import Instruction
from server.strategy import start_state
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from tests.client.secure.sites import RUN, SiteGrid, asked_for, grid_of, make_sites
from tests.run_configs import placed
from tests.simulations.run.secure_runs import POOLED, exchange_of, rounds

pytestmark = pytest.mark.usefixtures("one_model")

POLICY = (
    'mechanism = "record"\nmax_epsilon = 1.0\nmax_delta = 1e-5\nnoise_share = "sum"\n'
    'metrics = "none"\nsecure_aggregation = "required"\n'
)
TOGETHER = (
    *POOLED,
    "adapter.rank=16",
    "adapter.retained_rank=16",
    "aggregation.rule=fedit",
    "federation.rounds=1",
    "train.step=server",
    "method.distillation.weight=0",
    "method.distillation.future_weight=0",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "privacy.target_epsilon=1",
    "privacy.target_delta=1e-5",
    "privacy.metrics=none",
)


def terms(experiment):
    """Of a first request."""
    state = start_state(experiment, adapter_shapes(experiment.model, experiment.adapter))
    return sum_terms(experiment, "", Instruction(task="surgery", **PLACE), state)


PLACE = {"stage": 0, "server_round": 1, "rank": 16, "retained_rank": 16}
LESS = (
    "privacy.sample_rate=0.0001",
    "privacy.target_epsilon=0.9",
    "privacy.max_grad_norm=0.001",
    "privacy.colluding=0",
    "federation.rounds=2",
    'data.tasks=["surgery", "skin"]',
    "privacy.unit_column=patient",
)
"""Each changes the noise of a site, or what it hides."""


def played(sites, folder, *told_to_the_others):
    """A round in which the first site is told the truth."""
    truth = asked_for(*TOGETHER)
    lie = asked_for(*TOGETHER, *told_to_the_others)

    class Liar(SiteGrid):
        def _context(self, node):
            context = super()._context(node)
            if node != FIRST_CLIENT_NODE:
                context.run_config = placed(lie, f"/srv/{RUN}")
            return context

    return rounds(truth, folder / RUN, grid_of=grid_of(sites, Liar))


def test_sites_that_are_told_the_same_are_summed(tmp_path):
    sites = make_sites(tmp_path, policy=POLICY)
    ran = played(sites, tmp_path)
    assert ran.told("summed", "sites") == [4]
    assert all(site.trained() for site in sites)


def test_sites_that_are_told_to_add_less_noise_are_in_no_sum_with_the_others(tmp_path):
    sites = make_sites(tmp_path, policy=POLICY)
    with pytest.raises(UserError, match="1 of 4 clients gave a valid reply"):
        played(sites, tmp_path, "privacy.sample_rate=0.0001")
    assert not any(site.trained() for site in sites[1:])
    assert any("another form than the round's terms say" in e for e in sites[1].errors())


def test_a_round_is_judged_by_the_settings_that_its_noise_is_made_with(tmp_path, monkeypatch):
    """The other exchanges are told that a site may fail; the noise is made as if none could, in
    sums of all. The sum would be of three, with three shares of four that are needed."""
    sites = make_sites(tmp_path, policy=POLICY)
    truth = asked_for(*TOGETHER)
    lie = asked_for(*TOGETHER, "privacy.dropouts=1")

    class Liar(SiteGrid):
        exchange = ""

        def _execute(self, request):
            self.exchange = exchange_of(request)
            return super()._execute(request)

        def _context(self, node):
            context = super()._context(node)
            if self.exchange != "mask":
                context.run_config = placed(lie, f"/srv/{RUN}")
            return context

    monkeypatch.setattr("server.secure_aggregation.fewest_in_sum", lambda experiment: 3)
    with pytest.raises(UserError, match="0 of 4 clients gave a valid reply"):
        rounds(truth, tmp_path / RUN, grid_of=grid_of(sites, Liar))
    assert not any(site.trained() for site in sites)
    assert all("would sum 3 sites" in site.errors()[-1] for site in sites)


@pytest.mark.parametrize("told", LESS)
def test_whatever_noise_follows_from_is_agreed_on(told):
    assert terms(asked_for(*TOGETHER)) != terms(asked_for(*TOGETHER, told))


def test_what_is_a_sites_own_is_not():
    """Its columns, its folders, its threads."""
    grouped = [
        asked_for(*TOGETHER, f"privacy.unit_column={column}", f"run.threads={threads}")
        for column, threads in (("patient", 1), ("person", 2))
    ]
    assert terms(grouped[0]) == terms(grouped[1])


@pytest.mark.parametrize("simulated", [False, True])
def test_without_noise_no_server_chooses_whose_gradients_are_summed(tmp_path, simulated):
    """The run's seed would: with a small rate, of one site two records, and of the others none."""
    asked = ("privacy.mechanism=none", "privacy.noise_share=site", "privacy.sample_rate=0.001")
    experiment = asked_for(*TOGETHER, *asked)
    site = Site(lambda: Ledger(tmp_path), None, simulated)
    data = [Encoded((1, 2), 0)] * 200
    request = UpdateRequest(
        request="r",
        client="0",
        task="surgery",
        phase="learn",
        stage=0,
        server_round=1,
        data=data,
        record_ids=[RecordId("surgery", row) for row in range(200)],
        units=lambda: {"surgery": 200},
        site_units=lambda: 200,
    )
    sums = []

    def train(given):
        sums.append(given)
        return LocalUpdate({}, {})

    MECHANISMS["none"](experiment).update(request, site, train)
    assert sums[0].sample_rate == (0.001 if simulated else 1.0)
