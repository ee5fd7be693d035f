"""What the server makes of a sum over records: class sums, and the noise that it counts on."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.experiment import Experiment
from deal_core.deal.class_means import COUNT, SUM
from deal_core.deal.interface import EmbeddedTask, SumContext
from deal_core.lora.payload import PayloadError
from deal_core.methods import method_of
from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import COUNT_WEIGHT, NoisySum
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SeededNoise
from deal_core.protection import class_sum_noise
from deal_core.randomness import seeded
from server.class_sums import ClassSums, clients_to_ask
from server.plan import Step
from tests.server.fuzz_grid import tiny_model

LABELS, CLIENTS, SIZE = 3, ("0", "1", "2", "3"), 16
TASKS = ("skin", "eye")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model")))


def experiment(model, method="prototype", **prototype):
    settings = {"directions": 0, "noise_multiplier": 0.0, **prototype}
    return Experiment.model_validate(
        {
            "model": {"name": model},
            "method": {"name": method, "prototype": settings},
            "federation": {"clients": len(CLIENTS)},
        }
    )


@dataclass
class Played:
    """A sum of the round, what its method was given, and the events."""

    config: Experiment
    tasks: dict[str, list[str]]
    events: list[tuple[str, str]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    totals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    known: list[SumContext] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)

    @property
    def statistics(self):
        return next(each.statistics for each in method_of(self.config).phases)

    @property
    def sum(self):
        def absorb(state, totals, known):
            self.totals, self.known = dict(totals), [*self.known, known]
            return state

        def event(name, step, task, records=()):
            self.events.append((name, task))
            self.counts.extend(records)

        known = ("exact", "noise_multiplier", "shapes")
        watched = {name: getattr(self.statistics, name) for name in known}
        return ClassSums(
            clients=SimpleNamespace(experiment=self.config, event=event),
            step=Step("round", 0, 1),
            asked=clients_to_ask(self.tasks, CLIENTS),
            secure=None,
            statistics=SimpleNamespace(absorb=absorb, **watched),
            summed=self.tasks,
            classes=dict.fromkeys(TASKS, LABELS),
            stream=len(TASKS),
            context=self.context,
        )

    def context(self, tasks, deviation):
        self.asked.append(list(tasks))
        return SumContext(deviation, {}, None)


def records(client, task):
    generator = seeded("records", client, task)
    n = 150 + 10 * int(client)
    x = normalize(torch.randn(n, SIZE, generator=generator), dim=1)
    return x, torch.randint(LABELS, (n,), generator=generator)


def given(played, clients, noise_seed=0):
    """What the clients of each task add to the sum, by place."""
    statistics, sums = played.statistics, {}
    members = {name for own in clients.values() for name in own}
    multiplier, shares = class_sum_noise(played.config, statistics, len(members), 1)
    for place, task in enumerate(played.tasks):
        size = statistics.size(played.config.model)
        total = np.zeros((LABELS, size + 1), np.int64)
        for name in sorted(members):
            x, y = records(name, task)
            own = len(x) if name in clients[task] else 0
            source = SeededNoise(seeded("noise", noise_seed, name, task))
            data = [Encoded(tokens=(1,), target=0)] * own
            ids = [RecordId(task, row) for row in range(own)]
            bound = played.config.privacy.max_grad_norm
            of = {"sample_rate": 1.0, "noise_multiplier": multiplier, "max_grad_norm": bound}
            made = NoisySum(data, ids, shares, **of, noise=source)
            total += made.class_sums(x[:own, :size], y[:own], LABELS)
        sums[f"{place}.class_sums"] = total
    return sums


def state(**sums):
    return SimpleNamespace(sums=sums)


@pytest.mark.parametrize("bound", [1.0, 0.25])
def test_counts_and_sums_are_those_of_all_records(model, bound):
    """Of unit vectors the sums, with their counts, are clipped alike: means are exact."""
    config = experiment(model)
    privacy = config.privacy.model_copy(update={"max_grad_norm": bound})
    played = Played(config.model_copy(update={"privacy": privacy}), {"skin": list(CLIENTS)})
    played.sum.absorb(state(), given(played, played.tasks), len(CLIENTS), CLIENTS)
    x, y = (torch.cat(parts) for parts in zip(*(records(c, "skin") for c in CLIENTS), strict=True))
    found, counts = played.totals["skin"], torch.bincount(y, minlength=LABELS).double()
    clipped = bound / math.sqrt(1 + COUNT_WEIGHT**2)
    torch.testing.assert_close(found[COUNT], clipped * counts, rtol=2e-3, atol=0)
    means = torch.stack([x[y == label].double().mean(0) for label in range(LABELS)])
    torch.testing.assert_close(found[SUM] / found[COUNT][:, None], means, rtol=0, atol=1e-4)
    assert played.known[0].deviation == 0.0
    assert played.events == [("class_sums", "skin")]
    assert played.counts == pytest.approx(counts.tolist(), rel=0.04)


@pytest.mark.parametrize(("settings", "members"), [({}, 3), ({"directions": 8}, 4)])
def test_the_noise_that_heads_count_on_is_the_noise_that_clients_add(model, settings, members):
    clients = list(CLIENTS[:members])
    quiet = Played(experiment(model, **settings), {"skin": []})
    noised = Played(experiment(model, noise_multiplier=3.0, **settings), {"skin": []})
    entries = []
    for seed in range(60):
        for played in (quiet, noised):
            # nobody has a record of the task: what is left is noise
            sums = given(played, {"skin": [], "else": clients}, seed)
            played.tasks = {"skin": clients}
            played.sum.absorb(state(), sums, members, clients)
        assert not any(bool(part.any()) for part in quiet.totals["skin"].values())
        entries.append(noised.totals["skin"][SUM].flatten())
    assert entries[0].numel() == LABELS * settings.get("directions", SIZE)
    told = noised.known[0].deviation
    left = max(3, (members + 1) // 2 + 1)  # as many as a sum needs, of whom one may collude
    assert told == pytest.approx(3.0 * math.sqrt(members / (left - 1)))
    assert float(torch.cat(entries).std()) == pytest.approx(told, rel=0.05)


def test_all_that_have_worked_on_a_task_of_the_round_are_asked_each_once(model):
    played = Played(experiment(model), {"skin": ["3", "0"], "eye": ["0", "2"]})
    assert played.sum.asked == {"0": "skin", "2": "eye", "3": "skin"}


def test_the_layout_has_the_class_sums_of_every_task_and_no_example_or_loss(model):
    played = Played(experiment(model, directions=8), dict.fromkeys(TASKS, CLIENTS))
    layout = played.sum.layout(state(), "basis")
    shapes = {each.name: each.shape for each in layout.fields}
    assert shapes == dict.fromkeys(("0.class_sums", "1.class_sums"), (LABELS, 9))
    assert layout.basis == "basis"
    assert layout.sites == len(CLIENTS)


@pytest.mark.parametrize("left", [("0", "1"), ("0",), ()])
def test_a_task_of_fewer_than_three_clients_is_left_out_and_the_others_are_not(model, left):
    """Of the sum over two, each knows the other's part; and whoever failed gave nothing."""
    tasks = {"skin": list(CLIENTS[:3]), "eye": ["0", "1", "3"]}
    played = Played(experiment(model), tasks)
    sums = given(played, tasks)
    played.sum.absorb(state(), sums, 4, ("0", "1", "3"))
    assert played.totals.keys() == {"eye"}
    assert played.events == [("sums_left_out", "skin"), ("class_sums", "eye")]
    assert played.asked == [["eye"]]
    played.totals = {}
    before = state()
    assert played.sum.absorb(before, sums, 4, left) == (before, None)
    assert played.totals == {}
    assert played.events[2:] == [("sums_left_out", "skin"), ("sums_left_out", "eye")]


def exact(played):
    sums = {}
    for name in CLIENTS:
        x, y = records(name, "skin")
        own = played.statistics.exact.collect(EmbeddedTask(x, y, LABELS))
        sums |= {f"0.{key}": sums.get(f"0.{key}", 0) + part.numpy() for key, part in own.items()}
    return sums


def test_exact_sums_pass_as_they_are_and_what_no_data_can_have_is_refused(model):
    played = Played(experiment(model, "linear-probe"), {"skin": list(CLIENTS)})
    sums = exact(played)
    played.sum.absorb(state(), sums, len(CLIENTS), CLIENTS)
    passed = {f"0.{key}": part.numpy().tolist() for key, part in played.totals["skin"].items()}
    assert passed == {key: part.tolist() for key, part in sums.items()}
    assert played.known[0].deviation == 0.0
    for key, factor in (("0.count", -1.0), ("0.moment", 2.0)):
        with pytest.raises(PayloadError):
            played.sum.absorb(state(), {**sums, key: factor * sums[key]}, len(CLIENTS), CLIENTS)
