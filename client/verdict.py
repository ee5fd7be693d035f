"""What a site thinks of class means before they are used: one bit, from records that it holds back.

Nobody can look into a masked sum, and one site can ruin it. But each site has records that are in
no sum and that nothing is learnt from. Where these are answered worse with the class means than by
the names of labels, it says so; it says one thing in a stage, whatever it is asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from client.client_context import ClientContext
from client.gate import check_tasks
from client.local_evaluation import right_answers
from client.resources import Workbench
from deal_core.atomic_write import atomic_write
from deal_core.lora.state import State
from deal_core.models import has_label_logits
from deal_core.privacy.interface import Refusal
from deal_core.training.batching import Cache
from deal_core.wire.instruction import Instruction

CLEARLY = 0.2
"""Share of a new task's records that must be answered worse for the site to be against it."""


def verdict(
    bench: Workbench, client_context: ClientContext, state: State, instruction: Instruction
) -> bool:
    """Return whether records that are held back are answered better without the heads of ``state``.

    Args:
        bench: model and data.
        client_context: whose records.
        state: with the heads of all tasks so far.
        instruction: ``tasks`` are those whose class means are new.

    Raises:
        Refusal: the site gives no sums, or a mechanism protects its records: it keeps its bit.
        PayloadError: a task that is not of the run.
    """
    check_tasks(instruction, bench)
    policy = client_context.site.policy
    if bench.mechanism.unit is not None or (policy is not None and not policy.share_sums):
        raise Refusal("withheld", "what this site thinks of class means stays here")
    path = client_context.store.folder / "verdicts.json"
    said: dict[str, bool] = json.loads(path.read_text()) if path.exists() else {}
    stage = str(instruction.stage)
    if stage not in said:
        said[stage] = _worse(bench, client_context.client, state, instruction.tasks)
        _keep(path, said)
    return said[stage]


def _keep(path: Path, said: dict[str, bool]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(said))


def _worse(bench: Workbench, client: int, state: State, new: Sequence[str]) -> bool:
    """Compare right answers, with the task told and among all labels so far.

    Returns:
        Whether the heads make them worse by more than chance explains: of a new task's own answers
        a share of ``CLEARLY``, of all together one standard deviation of a sign test.
    """
    known, names = tuple(state.heads), replace(state, heads={})
    learnt = known if has_label_logits(bench.experiment.model) else None
    gained, records = 0.0, 0
    for task in known:
        share = bench.task(task, client)
        held = replace(share, test=share.held, cache=Cache())
        own, everywhere = right_answers(bench, task, held, state, learnt)
        own_names, everywhere_names = right_answers(bench, task, held, names, learnt)
        gained += own - own_names + everywhere - everywhere_names
        records += len(share.held)
        if task in new and own - own_names < -CLEARLY * len(share.held):
            return True
    return gained < -math.sqrt(records)
