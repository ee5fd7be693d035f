"""Small whole runs compute what they computed when ``golden.json`` was made."""

from copy import deepcopy

import pytest

from tests.golden.make import NAMES, differences, machine, made, read
from tests.simulations.deployment.loopback import SLOW
from tests.slow import slow_but

GOLDEN = read()


@pytest.mark.timeout(900 * SLOW)
@pytest.mark.parametrize("name", slow_but(NAMES, "lwf"))
def test_a_run_computes_what_it_did(name, tmp_path):
    same_machine = GOLDEN["machine"] == machine()
    assert differences(GOLDEN["runs"][name], made(name, tmp_path), same_machine) == []


def test_what_is_compared_is_there():
    """A run that has learnt nothing, or spent nothing, would pin nothing."""
    runs = GOLDEN["runs"]
    assert set(runs) == set(NAMES)
    assert all(any(norm for norm, *_ in run["adapter"].values()) for run in runs.values())
    for name in ("record", "private", "private-sums"):
        assert all(runs[name]["ledger"].values())
        assert min(runs[name]["privacy"]["epsilon"].values()) > 0
    assert set(runs["quickstart"]["adapter"]) > {"laboratory", "surgery"}, "class means were taken"


def test_a_difference_beyond_rounding_is_told():
    kept = GOLDEN["runs"]["record"]
    rounded, changed = deepcopy(kept), deepcopy(kept)
    tensor = next(iter(kept["adapter"]))
    norm = kept["adapter"][tensor][0]
    rounded["adapter"][tensor][1] += 5e-6 * norm
    rounded["task-il"][1][0] += 1 / kept["tests"][0]
    assert differences(kept, rounded, same_machine=False) == []
    assert len(differences(kept, rounded, same_machine=True)) == 1
    changed["adapter"][tensor][2] += 2e-5 * norm
    changed["task-il"][1][0] += 2 / kept["tests"][0]
    changed["wire"]["bytes_up"][0] += 1
    changed["privacy"]["epsilon"]["0"] *= 1.0001
    changed["ledger"]["1"][0]["steps"] += 1
    del changed["ledger"]["2"][0]["unit"]
    assert len(differences(kept, changed, same_machine=True)) == 6
