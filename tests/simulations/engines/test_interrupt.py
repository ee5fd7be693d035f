from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from simulations.engines.interrupt import deferred, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number):
    done = []

    def start() -> None:
        with stoppable():
            with deferred():
                signal.raise_signal(number)
                signal.raise_signal(number)
                done.append("the whole block")
            done.append("what comes after it")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done == ["the whole block"]


def test_what_is_started_in_the_block_hears_signals():
    """Ignored or blocked, they would be so in the new process as well."""
    with deferred():
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_a_fault_in_the_block_is_told_and_the_signal_as_well():
    def start() -> None:
        with stoppable(), deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("no")

    with pytest.raises(KeyboardInterrupt) as caught:
        start()
    assert isinstance(caught.value.__context__, ValueError)
