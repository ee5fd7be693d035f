"""What a run that Flower started leaves in Flower's log; a run with a listener leaves nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from client.app import make_app as make_client_app
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import to_run_config
from server.app import closing_lines, make_app
from server.results import read_results
from simulations.engines import inprocess
from tests.simulations.runs import at

Make = Callable[..., Experiment]


def run_as_flower_does(experiment: Experiment) -> None:
    """The ServerApp as ``flwr run .`` starts it: nobody listens."""
    from flwr.app import Context, RecordDict

    run_id, node = inprocess.RUN_ID, inprocess.SERVER_NODE
    config = to_run_config(experiment)
    with inprocess.assume_identity(run_id, node):
        grid = inprocess.InProcessGrid(
            make_client_app(), config, experiment.federation.clients, None
        )
        make_app()(grid, Context(run_id, node, {}, RecordDict(), config))


def test_it_ends_with_accuracy_and_place(
    make_experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    try:
        one = at(make_experiment('data.tasks=["surgery"]', "federation.rounds=1"), tmp_path / "a")
        run_as_flower_does(one)
        results = read_results(tmp_path / "a")
        assert said[-3:] == closing_lines(results, tmp_path / "a")
        assert results.average_accuracy is not None
        assert f"{100 * results.average_accuracy:.1f} %" in said[-3]
        assert results.class_incremental is not None
        among_all = results.class_incremental.average_accuracy
        assert said[-3].endswith(f", {100 * among_all:.1f} % among all labels")
        assert said[-2] == f"results: {tmp_path / 'a' / 'results.json'}"
        said.clear()
        inprocess.run_inprocess(at(one, tmp_path / "b"), lambda event: None)
        assert said == []
        unknown = results.model_copy(update={"average_accuracy": None})
        assert "not known" in closing_lines(unknown, tmp_path)[0]
    finally:
        logger.removeHandler(handler)
