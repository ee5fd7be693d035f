"""SIGKILL at random moments of a private run: the ledger never shows less than what has left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.privacy.events import composed
from deal_core.privacy.ledger import FILE, Ledger
from server.results import read_results
from tests.simulations.runs import at, simulated
from tests.sizes import ENOUGH_TO_LEARN

KILLS = 20
PROGRAM = """
import hashlib
import sys
from client.egress import check_reply
import client.app
from deal_core.config.experiment import Experiment
from simulations.engines.inprocess import run_inprocess

released = sys.argv[2]

def noted(reply, *rest):
    '''What leaves is noted, on the disk, before it leaves.'''
    if 'lora' in reply.content:
        status, site = reply.content['status'], reply.metadata.src_node_id
        with open(released, 'a') as file:
            arrays = sorted(reply.content['lora'].items())  # a file gives them in any order
            content = hashlib.sha256(b''.join(key.encode() + a.data for key, a in arrays))
            place = f"{site} {status['stage']} {status['server_round']}"
            file.write(f"{place} {content.hexdigest()}\\n")
            file.flush()
    return check_reply(reply, *rest)

client.app.check_reply = noted
run_inprocess(Experiment.model_validate_json(sys.argv[1]), lambda event: None)
"""


def released(path: Path) -> list[str]:
    """Places and contents of the updates that left, each once however often it left."""
    return sorted(set(path.read_text().splitlines())) if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments_the_ledger_stays_true(make_experiment, tmp_path):
    experiment = make_experiment(
        "privacy.mechanism=record",
        "privacy.noise=secure",
        "train.precision=float32",
        "train.batch_size=4",
        "federation.rounds=6",
        *ENOUGH_TO_LEARN,  # so that a round lasts long enough to be killed in
    )
    events: list[dict] = []
    simulated(experiment, tmp_path / "whole", events.append)
    took = events[-1]["time"] - events[0]["time"]
    whole = read_results(tmp_path / "whole").privacy
    folder, notes = tmp_path / "killed", tmp_path / "released"
    log = folder / "metrics.jsonl"
    draw, kills = random.Random(0), 0
    while not (folder / "results.json").exists():
        began, left = count(log, '"run_started"'), count(notes, "\n")
        resume = (folder / "checkpoint.safetensors").exists()
        text = at(experiment, folder, resume=resume).model_dump_json()
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, text, str(notes)])
        if kills < KILLS:
            wait(process, lambda began=began: count(log, '"run_started"') > began)
            if draw.random() < 0.6:  # mostly while updates are charged, sent and aggregated
                wait(process, lambda left=left: count(notes, "\n") > left)
            time.sleep(draw.uniform(0.0, took / 16))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.wait()
        for client in "01":
            check_ledger(folder / "sites" / client, client, notes)
    assert kills == KILLS, "the run ended before it was killed often enough"
    told = read_results(folder).privacy
    assert told == whole
    for client in "01":
        held = Ledger(folder / "sites" / client).events()
        assert len(held) == 12
        assert composed(held, held[0].delta) == whole.epsilon[client]
    assert len(released(notes)) == 24  # all rounds of both clients left, always the same bytes


def wait(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Until it has happened, or the process is gone."""
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and not happened():
        time.sleep(0.01)


def count(path: Path, word: str) -> int:
    return path.read_text().count(word) if path.exists() else 0


def check_ledger(site: Path, client: str, notes: Path) -> None:
    """All that left is in the ledger; nothing is in it twice."""
    if not (site / FILE).exists():
        assert not [line for line in released(notes) if line.startswith(f"{100 + int(client)} ")]
        return
    charged = [(e.stage, e.server_round) for e in Ledger(site).events()]
    assert len(set(charged)) == len(charged), json.dumps(charged)
    own = [line.split() for line in released(notes)]
    left = [(int(s), int(r)) for node, s, r, _ in own if int(node) == 100 + int(client)]
    assert len(set(left)) == len(left), "two updates of one place, and one charge"
    assert set(left) <= set(charged)
