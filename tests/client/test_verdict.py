"""When a site is against new class means: what chance explains is no reason."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from client import local_evaluation as verdict
from client.local_evaluation import local_evaluation

HELD = 16


def against(monkeypatch, told, among_all, tasks):
    """What a site says whose new, last task has so many more right answers with its head."""
    names = [f"task{number}" for number in range(tasks)]

    def right_answers(runtime, task, share, state, learnt):
        new = bool(state.heads) and task == names[-1]
        return 8 + told * new, 6 + among_all * new

    runtime = SimpleNamespace(
        task=lambda task, client: Share(),
        experiment=SimpleNamespace(model=None),
        statistics=None,
    )
    monkeypatch.setattr(verdict, "right_answers", right_answers)
    monkeypatch.setattr(verdict, "has_label_logits", lambda model: True)
    monkeypatch.setattr(verdict, "replace", replaced)
    state = SimpleNamespace(heads=dict.fromkeys(names))
    return verdict._worse(runtime, 0, state, names[-1:])


class Share:
    held = tuple(range(HELD))


def replaced(what, **fields):
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("told", "among_all", "tasks", "says"),
    [
        (-2, 0, 1, False),  # two of sixteen: chance
        (-4, 6, 1, True),  # the new task itself is ruined
        (-2, -3, 1, True),  # more than chance, of both
        (-2, -3, 4, False),  # of four tasks' records that is chance
        (0, 5, 1, False),
    ],
)
def test_a_site_is_against_what_chance_does_not_explain(monkeypatch, told, among_all, tasks, says):
    assert against(monkeypatch, told, among_all, tasks) is says


@pytest.mark.parametrize("earlier", [1, 4])
@pytest.mark.parametrize(("length", "says"), [(1.0, False), (500.0, True), (-500.0, False)])
def test_a_site_is_against_a_router_that_takes_texts_from_earlier_tasks(length, says, earlier):
    """A class mean as long as a lie may make it answers for all; nothing is written to find out."""
    names = [*(f"task{number}" for number in range(earlier)), "new"]
    generator = torch.Generator().manual_seed(0)
    centres = dict(zip(names, torch.eye(8), strict=False))
    texts = {
        name: centre + 0.1 * torch.rand(HELD, 8, generator=generator)
        for name, centre in centres.items()
    }
    lengths = {**dict.fromkeys(names, 1.0), "new": length}
    heads = {n: torch.cat([lengths[n] * c, torch.zeros(1)])[None] for n, c in centres.items()}

    @dataclass(frozen=True)
    class Texts:
        name: str
        held: tuple[int, ...] = tuple(range(HELD))
        test: tuple[int, ...] = ()
        cache: object = None

    runtime = SimpleNamespace(
        task=lambda task, client: Texts(task),
        statistics=SimpleNamespace(routes=True),
        vectors=lambda share, part, statistics: texts[share.name],
    )
    state = SimpleNamespace(heads=heads)
    assert verdict._worse(runtime, 0, state, ["new"]) is says


def test_a_site_short_of_tests_in_one_task_sits_out_evaluations_of_the_others(monkeypatch):
    """Else the difference of two sums would be what that site has."""

    def refuse(records, rule):
        raise LookupError(records, rule)

    monkeypatch.setattr("client.local_evaluation.require", refuse)
    has = {"a": range(40), "b": range(3)}
    granted = SimpleNamespace(
        client=SimpleNamespace(number=0),
        runtime=SimpleNamespace(
            tasks=("a", "b"), task=lambda task, client: SimpleNamespace(test=has[task])
        ),
        instruction=SimpleNamespace(tasks=("a",)),
        asked=lambda records: records,
    )
    with pytest.raises(LookupError, match=r"\(3, 'test records'\)"):
        local_evaluation(granted, masked=True)
