"""Rounds by hand are the rounds of a run: the same adapter, the same accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from deal_core.data import Example, TaskData, load_for_clients, partition
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import read_adapter
from deal_core.lora.adapter import relative_difference, stack
from deal_core.models.interface import LanguageModel
from simulations.api import (
    ClientUpdate,
    UserError,
    aggregate,
    begin_task,
    end_task,
    evaluate,
    load_base,
    run,
    start,
    train_client,
)
from tests.sizes import TINY

Make = Callable[..., Experiment]

pytestmark = pytest.mark.filterwarnings("ignore:task")  # those of tests are small


def shares_of(config: Experiment, task: str) -> list[TaskData]:
    """Each client's part, as a run divides a task."""
    whole, seed = load_for_clients(config, task), config.run.seed
    return partition(whole, config.data.partition, config.federation.clients, seed)


def all_tests(shares: list[TaskData]) -> TaskData:
    """All clients' test examples of a task."""
    whole = shares[0]
    return TaskData(whole.name, whole.labels, (), tuple(e for s in shares for e in s.test))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("method.name=sequential", "aggregation.rule=fedex"), marks=pytest.mark.slow),
        ("method.name=deal", "method.distillation.future_weight=0.5"),
    ],
    ids=["sequential-fedex", "deal"],
)
def test_rounds_by_hand_learn_what_a_run_learns(
    make_experiment: Make, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    config = make_experiment(*settings, *TINY, "train.precision=float32")
    whole = run(config, out=tmp_path / "run")
    model, state = load_base(config), start(config)
    shares = {task: shares_of(config, task) for task in config.data.tasks}
    labels = {task: shares[task][0].labels for task in shares}
    tasks, errors, matrix = list(shares), [], []
    tests = {task: all_tests(shares[task]).test for task in tasks}
    zero = {task: evaluate(model, state, tests[task], labels[task]) for task in tasks}
    assert zero == whole.results.zero_shot
    for stage, task in enumerate(tasks):
        state = begin_task(state, config, stage)
        for server_round in range(1, config.federation.rounds + 1):
            updates = [
                train_client(
                    model,
                    state,
                    share.train,
                    share.labels,
                    config,
                    client=str(number),
                    stage=stage,
                    server_round=server_round,
                    seen=[labels[name] for name in tasks[:stage]],
                    future=[labels[name] for name in tasks[stage + 1 :]],
                )
                for number, share in enumerate(shares[task])
            ]
            result = aggregate(state, updates, config, server_round=server_round)
            state = result.state
            errors.append(result.error)
        state = end_task(state, config)
        matrix.append([evaluate(model, state, tests[name], labels[name]) for name in tasks])
    assert matrix == whole.results.accuracy_matrix
    assert errors == pytest.approx(whole.results.aggregation_error, abs=1e-5)
    learnt = read_adapter(find_adapter(whole.folder))
    assert relative_difference(stack(state.parts()), learnt) < 1e-4


@pytest.fixture(scope="module")
def plain(make_experiment: Make) -> tuple[Experiment, LanguageModel, TaskData]:
    """An experiment, its base model, and a client's part of a task."""
    config = make_experiment()
    return config, load_base(config), shares_of(config, "surgery")[0]


def test_training_leaves_the_state_as_it_was(plain: tuple[Experiment, LanguageModel, TaskData]):
    config, model, share = plain
    state = begin_task(start(config), config)
    before = {name: f.B.clone() for name, f in state.current.layers.items()}
    update = train_client(model, state, share.train, share.labels, config)
    assert isinstance(update, ClientUpdate)
    assert update.weight == len(share.train)
    assert all((before[name] == f.B).all() for name, f in state.current.layers.items())
    assert any((before[name] != f.B).any() for name, f in update.adapter.layers.items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("privacy.mechanism=record", "train_client keeps no ledger and adds no noise"),
        ("method.name=replay", "method.name 'replay' keeps data at its clients"),
        ("method.name=ewc", "method.name 'ewc' keeps data at its clients"),
        ("method.name=linear-probe", "method.name 'linear-probe' does not train"),
    ],
)
def test_what_a_round_alone_cannot_do_is_refused(
    make_experiment: Make,
    plain: tuple[Experiment, LanguageModel, TaskData],
    settings: str,
    reason: str,
) -> None:
    config, model, share = plain
    with pytest.raises(UserError, match=reason):
        train_client(model, start(config), share.train, share.labels, make_experiment(settings))


def test_labels_and_prompts_that_a_round_alone_does_not_know_are_one_line(
    make_experiment: Make, make_causal, tmp_path: Path
) -> None:
    llama = make_causal(tmp_path, "llama")
    words = make_experiment("model.family=causal-lm", f'model.name="{llama}"', "adapter.rank=2")
    model = load_base(words)
    state = begin_task(start(words), words, 0)
    examples, labels = [Example("a b", "red"), Example("c d", "blue")], ("red", "blue")
    with pytest.raises(UserError, match="a whole run knows"):
        train_client(model, state, examples, labels, words, seen=[("green", "red")])
    with pytest.raises(UserError, match="its label 'blue' is not one of red, green"):
        train_client(model, state, examples, ("red", "green"), words)
    with pytest.raises(UserError, match="its label 'blue' is not one of red"):
        evaluate(model, state, examples, ("red",))
    told = [
        train_client(model, state, examples, labels, words, instruction=text).adapter
        for text in ("", "Answer with one of the options .")
    ]
    assert relative_difference(*told) > 1e-3  # the prompt is another
