"""The gate's table: what each reason to say no refuses, and what beside that it lets through."""

import re
from types import SimpleNamespace

import pytest

from client.gate import LEAST_NOISE, REFUSALS, Asked, Refusal, require
from client.runtime import ClientRuntime
from client.site_file import Connection, Identity, SiteData, SiteFile
from deal_core.errors import UserError
from deal_core.installed import package_digest
from deal_core.privacy.policy import BudgetSpent, OutsidePlan, Policy
from deal_core.wire.instruction import Instruction
from tests.client.real_site import LABELS, RealSite, asked

TASKS = tuple(LABELS)
NONE = "privacy.mechanism=none"
JOINT = asked(NONE, "stream.schedule=joint")
POOLED = asked("privacy.noise_share=sum", "aggregation.secure=true")
BY_GROUP = asked("privacy.unit_column=person")
GROUPS = Policy(mechanism="record", unit_column="patient")
MODULE = "0.attention.output.dense"
TEXTS = {**LABELS, "skin": ()}


def filed(**data):
    own = SiteData(path="data", **{"labels": LABELS, **data})
    return SiteFile(site=Identity(name="north"), server=Connection(address="here:1"), data=own)


def of_run(out="runs/a", sites=("south", "north")):
    names = ", ".join(f'"{name}"' for name in sites)
    return asked(f'run.out="{out}"', f"federation.sites=[{names}]")


def data(**changes):
    config = asked()
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def request(**fields):
    place = {"task": TASKS[0], "stage": 0, "server_round": 1, "rank": 8, "retained_rank": 8}
    return Instruction(**{**place, **fields})


def several(config, tasks, **more):
    return Asked(config, request=request(tasks=tasks), tasks=TASKS, **more)


def sums(config, share=True, noise=LEAST_NOISE, **more):
    statistics = SimpleNamespace(exact=more.pop("exact", None), noise_multiplier=noise)
    return Asked(config, Policy(share_sums=share), statistics=statistics, **more)


def under(policy, *overrides, **more):
    return Asked(asked(*overrides), policy, **more)


SHARED = Policy(noise_share="sum", colluding=1)
MASKS = Policy(secure_aggregation="required")
CASES = {
    "package": [
        (Asked(asked(), package="0" * 64), Asked(asked(), package=package_digest())),
    ],
    "run": [
        (Asked(of_run(sites=["south"]), file=filed()), Asked(of_run(), file=filed())),
        (Asked(of_run("runs/.."), file=filed()), Asked(of_run("runs/a"), file=filed())),
    ],
    "unit": [
        (Asked(BY_GROUP, Policy()), Asked(BY_GROUP, GROUPS)),
        (Asked(asked(), GROUPS), Asked(asked(), Policy())),
    ],
    "model": [
        (Asked(asked('model.name="/srv/model"'), file=filed()), Asked(asked(), file=filed())),
    ],
    "data": [
        (Asked(asked(), file=filed(labels={"skin": LABELS["skin"]})), Asked(asked(), file=filed())),
        (Asked(asked(labels={"skin": ("Eczema",)}), file=filed()), Asked(asked(), file=filed())),
        (
            Asked(data(labels=TEXTS), file=filed(labels=TEXTS)),
            Asked(data(labels=TEXTS, generation=("skin",)), file=filed(labels=TEXTS)),
        ),
        (
            Asked(data(measures={"skin": "entity-f1"}), file=filed()),
            Asked(data(measures={"skin": "entity-f1"}), file=filed(measures={"skin": "entity-f1"})),
        ),
        (
            Asked(data(instructions={"skin": "Tell all."}), file=filed(instructions={"skin": "A"})),
            Asked(data(instructions={"skin": "A"}), file=filed(instructions={"skin": "A"})),
        ),
        (
            Asked(data(public_path="/etc/passwd"), file=filed()),
            Asked(data(public_path="/etc/passwd"), file=filed(public_path="public.txt")),
        ),
    ],
    "policy": [
        (under(Policy(max_epsilon=2.0), NONE), under(Policy(max_epsilon=2.0))),
        (
            under(Policy(max_rank=8), "adapter.client_ranks=[2, 9]"),
            under(Policy(max_rank=9), "adapter.client_ranks=[2, 9]"),
        ),
        (
            under(Policy(), f'adapter.target_modules=["{MODULE}"]'),
            under(Policy(target_modules=(MODULE,)), f'adapter.target_modules=["{MODULE}"]'),
        ),
        (Asked(POOLED, Policy(noise_share="site")), Asked(POOLED, SHARED)),
        (Asked(POOLED, Policy(noise_share="sum", colluding=2)), Asked(POOLED, SHARED)),
    ],
    "sum": [
        (
            Asked(asked(NONE, "aggregation.secure=true", "method.name=ewc")),
            Asked(asked("aggregation.secure=true", "method.name=ewc")),
        ),
        (
            Asked(asked(NONE, "aggregation.secure=true", "stream.schedule=per-client")),
            Asked(asked(NONE, "aggregation.secure=true")),
        ),
    ],
    "masks": [(under(MASKS), under(MASKS, "aggregation.secure=true"))],
    "possible": [(Asked(asked(), fault=UserError("no delta")), Asked(asked()))],
    "program": [
        (
            Asked(asked(), insists={"adapter.rank": 3}),
            Asked(asked("adapter.rank=3"), insists={"adapter.rank": 3}),
        ),
        (Asked(asked(), own_loop=True), Asked(asked(NONE), own_loop=True)),
        (Asked(POOLED, own_noise=True), Asked(asked(), own_noise=True)),
    ],
    "names": [
        (
            Asked(asked(), request=request(seen=("elsewhere",)), tasks=TASKS),
            Asked(asked(), request=request(seen=("skin",)), tasks=TASKS),
        ),
    ],
    "rank": [
        (under(Policy(max_rank=8), request=request(rank=9)), under(Policy(), request=request())),
    ],
    "several tasks": [
        (several(asked(NONE), TASKS), several(JOINT, TASKS)),
        (several(asked("stream.schedule=joint"), TASKS), several(JOINT, TASKS)),
        (
            several(JOINT, TASKS[1:], statistics=SimpleNamespace()),
            several(JOINT, TASKS[:2], statistics=SimpleNamespace()),
        ),
        (several(JOINT, TASKS[:2]), several(JOINT, TASKS)),
    ],
    "class sums": [
        (sums(asked(NONE), exact=True), sums(asked(NONE), exact=True, simulated=True)),
        (sums(asked(NONE), share=False), sums(asked(), share=False)),
        (sums(asked(NONE), noise=0.6), sums(asked(NONE))),
        (sums(asked(NONE, "privacy.colluding=0")), sums(asked("privacy.colluding=0"))),
    ],
    "verdict": [(under(Policy(share_sums=False), NONE), under(Policy(share_sums=True), NONE))],
    "counts": [(under(Policy(metrics="summed")), under(Policy(metrics="clear")))],
    "counts in a sum": [
        (under(Policy(), "privacy.metrics=summed"), under(Policy(metrics="summed"))),
    ],
    "test records": [
        (under(Policy(min_records=5), records=4), under(Policy(min_records=5), records=5)),
    ],
    "records": [
        (Asked(asked(NONE), request=request()), Asked(asked(), request=request())),
        (
            under(Policy(min_records=5), "privacy.target_epsilon=1000", records=4),
            under(Policy(min_records=5), records=4),
        ),
    ],
    "release": [
        (Asked(asked(), fault=BudgetSpent("past 8")), Asked(asked())),
        (Asked(asked(), fault=OutsidePlan("task 'x' is not in the plan")), Asked(asked())),
    ],
    "given sums": [
        (
            Asked(asked(), given=("one form", 3), wanted=("another", 3)),
            Asked(asked(), given=("one form", 3), wanted=("one form", 3)),
        ),
        (
            Asked(asked(), given=("", 9), wanted=("", 3)),
            Asked(asked(), given=("", 2), wanted=("", 3)),
        ),
    ],
}
"""What is judged, to what each reason in its order refuses and to what it lets through."""


def test_every_reason_has_a_case():
    assert {part: len(rules) for part, rules in REFUSALS.items()} == {
        part: len(cases) for part, cases in CASES.items()
    }


@pytest.mark.parametrize("part", CASES)
def test_each_reason_refuses_with_its_code_and_nothing_beside_it(part):
    for rule, (refused, allowed) in zip(REFUSALS[part], CASES[part], strict=True):
        line = re.escape(rule.reason.partition("{")[0])
        with pytest.raises(Refusal, match=line) as no:
            require(refused, part)
        assert no.value.code == rule.code
        assert not rule.test(allowed)
        require(allowed, part)


@pytest.mark.parametrize("cannot", ["method.name=replay", "stream.schedule=joint"])
def test_what_nothing_can_protect_is_refused_before_data_are_read(tmp_path, monkeypatch, cannot):
    site = RealSite(tmp_path)
    monkeypatch.setattr(ClientRuntime, "_share", lambda runtime, task: pytest.fail("reads data"))
    reply = site.answer(asked(cannot), {})
    assert reply.content.config_records["status"]["code"] == "policy"
    assert not site.events


@pytest.mark.parametrize("labels", [("Surgery",), ("Surgery", "Radiology"), ("A", "B", "C")])
def test_the_labels_of_a_task_are_those_that_the_site_has_declared(labels):
    """A label that a server leaves out would tell which sites have rows of it."""
    with pytest.raises(UserError, match="task 'surgery' has other labels than in"):
        require(Asked(asked(labels={**LABELS, "surgery": labels}), file=filed()), "data")


def test_the_rank_of_all_is_limited_as_those_of_clients_are():
    with pytest.raises(Refusal, match=r"adapter\.rank is 9, .* allows 8"):
        require(under(Policy(max_rank=8), "adapter.rank=9"), "policy")


def test_a_mechanism_in_name_alone_is_no_leave_to_give_class_sums():
    """Nor are masks: of a label that one site alone has, a sum over sites is that site's."""
    for config in (asked("privacy.target_epsilon=1000"), asked(NONE, "aggregation.secure=true")):
        for given in ({"share": False}, {"noise": 0.0}):
            with pytest.raises(Refusal):
                require(sums(config, **given), "class sums")
            require(sums(asked(), **given), "class sums")
