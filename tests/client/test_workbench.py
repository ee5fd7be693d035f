from __future__ import annotations

from client.resources import Workbench
from deal_core.config.experiment import Experiment


def test_what_a_client_worked_out_for_a_task_ends_with_the_task():
    bench = Workbench(Experiment())
    one, two = "laboratory", "surgery"
    first = bench.learning(0, one)
    assert bench.learning(0, one) is first
    assert bench.learning(1, one) is not first
    assert bench.learning(0, two) is not first
    assert bench.learning(0, one) is not first  # it was dropped
