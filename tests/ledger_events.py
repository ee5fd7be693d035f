"""A private release as a ledger notes it."""

from dataclasses import replace
from typing import Any

from deal_core.privacy.events import LedgerEvent


def ledger_event(**changed: Any) -> LedgerEvent:
    """Ten steps on a tenth of the records of a task."""
    event = LedgerEvent(
        run="run",
        task="surgery",
        phase="learn",
        stage=0,
        server_round=1,
        mechanism="record",
        unit="record",
        sample_rate=0.1,
        noise_multiplier=1.5,
        steps=10,
        max_grad_norm=1.0,
        delta=1e-4,
        simulation_only=False,
    )
    return replace(event, **changed)
