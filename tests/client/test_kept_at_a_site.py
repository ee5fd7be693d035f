"""What a site kept under a laxer policy, from another run, or with other settings: what was made
without noise, or with little, reaches no update whose noise is for less."""

from dataclasses import replace

import pytest
import torch

from client.state import RoundStore, folder_of, forget
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.methods import make_method
from deal_core.randomness import seeded
from tests.client.real_site import LABELS, RealSite, code, rows, start, update
from tests.client.real_site import small as asked
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")


OPEN = 'mechanism = "none"\nmetrics = "clear"\nshare_num_examples = true\n'


def test_an_update_that_was_kept_leaves_as_the_policy_of_today_says(tmp_path):
    """It was made under another one; the server asks again."""
    experiment, none = asked("privacy.mechanism=none"), 'mechanism = "none"\n'
    first = RealSite(tmp_path, OPEN).answer(experiment, {})
    assert list((tmp_path / "state").rglob("update-*.safetensors"))
    assert {"loss", "seconds"} <= set(first.content["metrics"])
    assert first.content["metrics"]["num_examples"] == 40
    for stricter, ends in (
        ('mechanism = "record"\nmax_epsilon = 1.0\n', "policy"),
        (none + 'secure_aggregation = "required"\n', "policy"),
        (none + "max_rank = 1\n", "policy"),
        (none + "min_records = 100\n", "no-data"),
    ):
        reply = RealSite(tmp_path, stricter).answer(experiment, {})
        assert (code(reply), set(reply.content)) == (ends, {"status"})
    again = RealSite(tmp_path, none).answer(experiment, {})
    assert set(again.content["metrics"]) == {"num_examples"}
    assert again.content["metrics"]["num_examples"] == 1
    assert torch.equal(update(first), update(again))  # the same one, not trained again


@pytest.mark.slow
def test_spending_that_was_kept_leaves_as_the_policy_of_today_says(tmp_path):
    private = 'mechanism = "record"\nmax_epsilon = 1.0\n'
    told = {"epsilon", "delta", "n_delta"}
    first = RealSite(tmp_path, private + "share_num_examples = true\n").answer(asked(), {})
    assert told <= set(first.content["metrics"])
    again = RealSite(tmp_path, private + "spending = false\n").answer(asked(), {})
    assert set(again.content["metrics"]) == set(first.content["metrics"]) - told
    one, two = (update(reply) for reply in (first, again))  # the same one, charged once
    assert torch.equal(one, two)


PRIVATE = 'mechanism = "record"\n'


STRICTER = {
    "max_epsilon = 1.0\n": (50, "budget-spent"),
    "min_records = 1000\n": (500, "no-data"),
}
"""A line of the policy of today, the epsilon that was asked, and how the request ends then."""


@pytest.mark.parametrize("line", slow_but(STRICTER, "max_epsilon = 1.0\n"))
def test_a_charged_update_does_not_outlive_a_stricter_policy(tmp_path, line):
    """It was charged and never left: the ledger keeps it for the same request."""
    epsilon, ends = STRICTER[line]
    experiment = asked(f"privacy.target_epsilon={epsilon}", "privacy.metrics=none")
    first = RealSite(tmp_path, PRIVATE)
    assert code(first.answer(experiment, {})) == "ok"
    reply = RealSite(tmp_path, PRIVATE + line).answer(experiment, {})
    assert code(reply) == ends
    assert set(reply.content) == {"status"}
    assert len(first.events) == 1


ANY = 'metrics = "none"\n'
OF_RECORD = ("privacy.mechanism=record", "privacy.target_epsilon=1")


@pytest.fixture
def found(monkeypatch):
    """How many tensors were read of earlier rounds, at each look."""
    read = []
    load = RoundStore.load

    def spied(store, basis):
        read.append(len(load(store, basis)))
        return load(store, basis)

    monkeypatch.setattr(RoundStore, "load", spied)
    return read


def later_task(experiment):
    """What a second task begins with: something was learnt before."""
    begun = start(experiment)
    layers = {n: LoraFactors(f.A, f.B + 0.01) for n, f in begun.current.layers.items()}
    learnt = replace(begun, current=Adapter(layers, begun.current.scaling))
    return make_method(experiment.method, experiment.adapter).begin_task(learnt, seeded("next"))


def answered(site, server_round, *settings):
    experiment = asked(*settings)
    state = later_task(experiment)
    known = state.num_reference_directions
    request = {"stage": 1, "server_round": server_round, "trained": ["lora_B"]}
    reply = site.answer(experiment, {**request, "num_reference_directions": known}, state)
    assert code(reply) == "ok"


def test_what_was_left_without_a_mechanism_reaches_no_update_under_one(tmp_path, found):
    settings = ("method.name=sequential", "wire.dtype=int8", "aggregation.rule=ffa")
    site = RealSite(tmp_path, ANY + "min_records = 1\n")
    free = (*settings, "privacy.mechanism=none")
    answered(site, 1, *free)
    answered(site, 2, *free)  # the run goes on with what it has left itself
    assert found[0] == 0 < found[1]
    del found[:]
    answered(site, 3, *settings, *OF_RECORD, "train.batch_size=40")
    answered(site, 3, *free, "train.learning_rate=1e-5")
    assert set(found) <= {0}


def test_an_earlier_run_in_the_same_folder_is_forgotten(tmp_path):
    old, own = (folder_of(tmp_path, name) for name in ("old", "own"))
    for folder in (old, own):
        RoundStore(folder, 0, 1).save("basis", {})
    forget(own)
    assert not old.exists()
    assert list(own.iterdir())


@pytest.mark.parametrize(
    ("epsilon", "ends"), [(1000, "no-data"), (8, "ok")], ids=["in name alone", "a mechanism"]
)
def test_a_mechanism_in_name_alone_keeps_the_floor_of_records(tmp_path, epsilon, ends):
    """Its noise hides nothing, and a task may have one record."""
    site = RealSite(tmp_path, ANY, {task: rows(task, 3) for task in LABELS})
    settings = (OF_RECORD[0], f"privacy.target_epsilon={epsilon}", "train.batch_size=3")
    assert code(site.answer(asked(*settings), {})) == ends
