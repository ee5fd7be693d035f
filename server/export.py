"""What a run leaves: the adapter folder, and its way to the sites that are connected at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from peft import LoraConfig
from safetensors.numpy import save

from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import Experiment
from deal_core.data import open_source, public_labels
from deal_core.inference.folder import AdapterFolder, Inference, TaskSpace
from deal_core.lora.adapter import Adapter, is_nonzero, nonzero_rank, split, stack, zero_adapter
from deal_core.lora.arrays import to_arrays
from deal_core.lora.kinds import kind_of
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.methods import method_of, statistics_of, whole_heads
from deal_core.models import FAMILIES, has_label_logits
from deal_core.models.loading import TO_THE_BIT, pinned, upstream_of, with_revision
from deal_core.wire.records import DIGEST, RECORD, digest_of, read_folder
from server.clients import Reply, Roster, collect
from server.folder import EventLog
from server.wire import status

KIND = f"{MessageType.QUERY}.adapter"
SECONDS = 120.0
"""How long the run waits for sites to say that they have it; who does not can be given it by
hand."""


def hand_over(grid: Grid, roster: Roster, folder: Path, events: EventLog, seconds: float) -> None:
    """Send the files of an adapter folder, and note who has them. Results are written by now: what
    goes wrong here is an event, and no reason for the run to fail.

    Args:
        grid: to the sites.
        roster: of the run.
        folder: of the adapter.
        events: ``adapter_sent`` with the digest and the clients that have it, by number; and
            ``adapter_missing`` for each that has not.
        seconds: how long to wait, at most ``SECONDS``.
    """
    try:
        files = read_folder(folder)
        digest = digest_of(files)
        nodes = dict(roster.connected())
        within = min(seconds, SECONDS)
        content = _content(files, digest)
        requests = {n: Message(content, node, KIND, ttl=within) for n, node in nodes.items()}
        faults = {r.client: _fault(r) for r in collect(grid, requests, within) if not r.dropped}
    except Exception as error:
        events.write("adapter_missing", reason=f"{type(error).__name__}: {error}"[:500])
        return
    have = [name for name in roster.clients if faults.get(name) == ""]
    events.write("adapter_sent", sha256=digest, clients=have)
    for name in roster.clients:
        if name not in have:
            reason = faults.get(name, "not connected")
            events.write("adapter_missing", client=name, reason=reason)


def _content(files: dict[str, bytes], digest: str) -> RecordDict:
    arrays = {name: Array(np.frombuffer(data, np.uint8)) for name, data in files.items()}
    return RecordDict({RECORD: ArrayRecord(arrays), DIGEST: ConfigRecord({"sha256": digest})})


def _fault(reply: Reply) -> str:
    """Return why a site has no adapter; empty: it has."""
    if reply.message is None:
        return reply.fault
    try:
        code = status(reply.message)
    except PayloadError as fault:
        return str(fault)
    return "" if code == "ok" else f"site reports {code[:40]!r}"


PACKAGES = ("federated-deal", "flwr", "torch", "transformers", "peft", "safetensors")


def export_adapter(
    folder: Path, state: State, experiment: Experiment, tasks: Sequence[TaskSpace]
) -> Inference:
    """Write everything of an adapter folder (:class:`AdapterFolder`) but its card. No weight of the
    base model is read.

    All parts are stacked, so one PEFT adapter of the summed rank gives exactly the global model;
    directions that are zero in every layer are left out.
    A base model of the hub is named with the commit that was read. Where PEFT alone could not load
    the adapter (``AdapterKind.map_behind``), PEFT's settings are left out.

    Args:
        folder: made where it is missing.
        state: the global model.
        experiment: of the run.
        tasks: of the stream, in its order.

    Returns:
        What ``inference.json`` says.
    """
    model = experiment.model.model_copy(update={"name": pinned(experiment.model.name)})
    experiment = experiment.model_copy(update={"model": model})
    state = without_zero_directions(state)
    files, merged = AdapterFolder(folder), stack(state.parts())
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {key: np.ascontiguousarray(value) for key, value in to_arrays(merged).items()}
    atomic_write(files.weights, save(arrays, {"format": "pt"}))
    files.heads.unlink(missing_ok=True)
    files.config.unlink(missing_ok=True)
    if state.heads:
        whole = whole_heads(state)
        heads = {task: np.ascontiguousarray(head.numpy()) for task, head in whole.items()}
        atomic_write(files.heads, save(heads, {"format": "pt"}))
    if kind_of(experiment.adapter).map_behind is None:  # PEFT finds its layers in the base model
        peft_config(merged, experiment).save_pretrained(str(folder))
    inference = make_inference(state, experiment, tasks)
    atomic_write(files.inference, inference.model_dump_json(indent=2) + "\n")
    return inference


def without_zero_directions(state: State) -> State:
    """Return the same model in as few directions as its parts are laid out in: what is retained
    without its last ones that are zero, and one in the place of a current adapter that is zero."""
    retained = split(state.retained, nonzero_rank(state.retained))[0]
    current = state.current
    if not is_nonzero(current):
        current = zero_adapter(current.shapes, 1, current.scaling)
    return replace(state, retained=retained, current=current)


def peft_config(adapter: Adapter, experiment: Experiment) -> LoraConfig:
    """Return PEFT's settings of all adapters as one. An embedded base model has the name under
    which the hub has the same weights, where it has them."""
    name, revision = with_revision(experiment.model.name)
    name = upstream_of(name) if name in TO_THE_BIT else name
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank,
        target_modules=sorted(adapter.layers),
        base_model_name_or_path=name,
        revision=revision or None,
        task_type=FAMILIES[experiment.model.family].task_type,
        inference_mode=True,
    )


def make_inference(state: State, experiment: Experiment, tasks: Sequence[TaskSpace]) -> Inference:
    """Return what it takes to answer as the clients' evaluation does."""
    statistics = statistics_of(method_of(experiment)) if state.heads else None
    needs_float32 = experiment.privacy.mechanism != "none"
    precision = experiment.train.precision
    logits = has_label_logits(experiment.model)
    return Inference(
        model=experiment.model,
        adapter_kind=experiment.adapter.kind,
        upstream=upstream_of(experiment.model.name),
        task_type=FAMILIES[experiment.model.family].task_type.value,
        pooling="mean" if logits else "none",
        max_length=experiment.train.max_length,
        precision="float32" if precision == "auto" and needs_float32 else precision,
        tasks=tuple(tasks),
        current_rank=state.current.rank,
        current_scaling=state.current.scaling,
        head_layers=statistics.layers if statistics is not None else 0,
        names_weight=statistics.names_weight(logits) if statistics is not None else 0.0,
        versions=package_versions(),
    )


def task_spaces(experiment: Experiment, learnt: Sequence[str]) -> tuple[TaskSpace, ...]:
    """Return the label spaces of the stream's tasks, which are public; where all are declared, no
    data is read.

    Args:
        experiment: of the run.
        learnt: tasks that some client has worked on.

    Raises:
        UserError: the labels are in data that cannot be read.
    """
    data = experiment.data
    return tuple(
        TaskSpace(
            name=task,
            labels=public_labels(data, task),
            learnt=task in learnt,
            instruction=data.instructions.get(task, ""),
        )
        for task in open_source(data).task_names()
    )


def package_versions() -> dict[str, str]:
    """Return the versions of what a run is made with; a package that is not installed is left
    out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
