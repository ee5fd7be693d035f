"""The strategy under Flower's own loop, and what a round makes of an aggregate."""

import torch
from flwr.serverapp.strategy import Strategy

from deal_core.aggregation.rule import Aggregate
from deal_core.config.file import to_run_config
from deal_core.lora.adapter import relative_difference, stack, zero_adapter
from deal_core.lora.state import State
from deal_core.models import adapter_shapes
from server.clients import Clients, find_roster
from server.folder import EventLog, read_events
from server.plan import make_plan
from server.strategy import DealStrategy, start_state
from server.summation import fold_residual
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.server.fuzz_grid import bytes_of, tiny_app, tiny_model
from tests.server.test_fuzz import settings

SHAPES = {"first": (12, 20), "second": (8, 16)}


def strategy(folder, model, rounds):
    """A strategy as anybody's ServerApp makes one; two tasks and three clients."""
    experiment = settings(folder, model, "fedit", "int8")
    few = experiment.federation.model_copy(update={"clients": 3, "rounds": rounds})
    experiment = experiment.model_copy(update={"federation": few})
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    grid = InProcessGrid(tiny_app(experiment, shapes), to_run_config(experiment), 3)
    roster = find_roster(grid, few)
    clients = Clients(grid, experiment, roster, EventLog(folder / "metrics.jsonl"))
    plan = make_plan(experiment, experiment.data.tasks, roster.clients)
    return DealStrategy(clients, plan, start_state(experiment, shapes))


def test_flowers_own_loop_plays_the_run_that_its_steps_are(tmp_path):
    model = tiny_model(tmp_path / "model")
    for rounds in (1, 2):
        played, started = (tmp_path / f"{name}-{rounds}" for name in ("played", "started"))
        for folder in (played, started):
            folder.mkdir()
        with assume_identity(1, 1):
            one, two = strategy(played, model, rounds), strategy(started, model, rounds)
            for step in one.steps:
                one.play(step)
            assert isinstance(two, Strategy)
            grid, number = two.clients.grid, two.num_rounds
            result = two.start(grid, two.arrays, number, timeout=60.0)
        assert [*map(bytes_of, one.state.parts())] == [*map(bytes_of, two.state.parts())]
        assert one.history.evaluations == two.history.evaluations
        assert len(two.history.evaluations) == 1 + 2  # what it begins with, and two tasks
        names = [
            [event["event"] for event in read_events(f / "metrics.jsonl")]
            for f in (played, started)
        ]
        assert names[0] == names[1]
        assert result.arrays.keys() == two.arrays.keys()
        assert list(result.train_metrics_clientapp) == [*range(1, 2 * rounds + 1)]
        assert list(result.evaluate_metrics_clientapp) == [rounds, 2 * rounds]


def test_what_an_exact_rule_finds_no_room_for_is_kept_whole_and_does_not_grow(random_adapter):
    """Twelve rounds of rank 3: 36 directions, where no layer has more than 12."""
    state = State(random_adapter(SHAPES, 4, 2.0, 0), zero_adapter(SHAPES, 6))
    rests = []
    for server_round in range(12):
        rests.append(random_adapter(SHAPES, 3, 1.0, 1 + server_round))
        state = fold_residual(state, Aggregate(state.current, rests[-1], error=0.0))
        assert state.residual is not None
        assert state.residual.rank <= 12
        assert relative_difference(state.residual, stack(rests)) < 1e-6
    for name, shape in SHAPES.items():
        factors = state.residual.layers[name]
        assert factors.A.dtype == torch.float32
        assert (factors.B.shape[0], factors.A.shape[1]) == shape
