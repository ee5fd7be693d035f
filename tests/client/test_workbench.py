from __future__ import annotations

from client.workbench import ClientTask, Workbench
from deal_core.config import Experiment
from deal_core.memory import Memory


def test_what_a_client_worked_out_for_a_task_ends_with_the_task():
    bench = Workbench(Experiment())
    one, two = (ClientTask(("a",), (), (), Memory()) for _ in range(2))
    first = bench.learning(0, one)
    assert bench.learning(0, one) is first
    assert bench.learning(1, one) is not first
    assert bench.learning(0, two) is not first
    assert bench.learning(0, one) is not first  # it was dropped
