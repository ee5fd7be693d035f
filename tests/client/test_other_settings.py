"""What a site keeps from round to round is of one run and its very settings: what was made without
noise, or with little, reaches no update whose noise is for less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.state import RoundStore, folder_of, forget
from deal_core.config.experiment import Experiment
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.randomness import seeded
from tests.client.real_site import LABELS, RealSite, asked, code, rows, start

ANY = 'metrics = "none"\n'
OF_RECORD = ("privacy.mechanism=record", "privacy.target_epsilon=1")


@pytest.fixture
def found(monkeypatch) -> list[int]:
    """How many tensors were read of earlier rounds, at each look."""
    read: list[int] = []
    load = RoundStore.load

    def spied(store, basis):
        read.append(len(load(store, basis)))
        return load(store, basis)

    monkeypatch.setattr(RoundStore, "load", spied)
    return read


def later_task(experiment: Experiment) -> State:
    """What a second task begins with: something was learnt before."""
    begun = start(experiment)
    layers = {n: LoraFactors(f.A, f.B + 0.01) for n, f in begun.current.layers.items()}
    learnt = replace(begun, current=Adapter(layers, begun.current.scaling))
    return make_method(experiment.method, experiment.adapter).begin_task(learnt, seeded("next"))


def answered(site: RealSite, server_round: int, *settings: str) -> None:
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
