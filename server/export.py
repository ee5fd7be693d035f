"""What a run leaves: the adapter folder with its model card, and its way to the sites that are
connected at the end."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from jinja2 import Environment, StrictUndefined
from peft import LoraConfig
from safetensors.numpy import save

from deal_core import metrics
from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import Experiment
from deal_core.data import open_source, public_labels
from deal_core.deal.class_means import whole_heads
from deal_core.deal.interface import statistics_of
from deal_core.errors import choose
from deal_core.inference.folder import AdapterFolder, ComponentRows, Inference, TaskSpace
from deal_core.lora.adapter import Adapter, is_nonzero, nonzero_rank, split, stack, zero_adapter
from deal_core.lora.kinds import KINDS, kind_of, rule_of
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State, to_arrays
from deal_core.methods import KEEP_TEXTS, method_of
from deal_core.models import family_of
from deal_core.models.loading import GIVEN, TO_THE_BIT, given, pinned, upstream_of, with_revision
from deal_core.training.text_overlap import TITLES
from deal_core.wire.records import DIGEST, RECORD, digest_of, read_folder
from server.clients import Roster
from server.folder import EventLog
from server.results import VOID, Measures, Results, rounded_up
from server.wire import Reply, collect, status

KIND = f"{MessageType.QUERY}.adapter"
SECONDS = 120.0
"""How long the run waits for sites to say that they have the adapter; who does not can be given it
by hand."""
PACKAGES = ("federated-deal", "flwr", "torch", "transformers", "peft", "safetensors")


def hand_over(grid: Grid, roster: Roster, folder: Path, events: EventLog, seconds: float) -> None:
    """Send the files of an adapter folder, and note who has them: ``adapter_sent`` with the digest
    and the clients that have it, and ``adapter_missing`` for each that has not. Results are written
    by now: what goes wrong here is an event, and no reason for the run to fail."""
    try:
        files, within = read_folder(folder), min(seconds, SECONDS)
        digest = digest_of(files)
        arrays = {name: Array(np.frombuffer(data, np.uint8)) for name, data in files.items()}
        told = ConfigRecord({"sha256": digest})
        content = RecordDict({RECORD: ArrayRecord(arrays), DIGEST: told})
        requests = {
            name: Message(content, node, KIND, ttl=within)
            for name, node in roster.connected().items()
        }
        faults = {reply.client: _fault(reply) for reply in collect(grid, requests, within)}
    except Exception as error:
        events.write("adapter_missing", reason=f"{type(error).__name__}: {error}"[:500])
        return
    have = [name for name in roster.clients if faults.get(name) == ""]
    events.write("adapter_sent", sha256=digest, clients=have)
    for name in roster.clients:
        if name not in have:
            reason = faults.get(name, "not connected")
            events.write("adapter_missing", client=name, reason=reason)


def _fault(reply: Reply) -> str:
    """Why a site has no adapter; empty: it has."""
    try:
        code = status(reply.answered())
    except PayloadError as fault:
        return str(fault)
    return "" if code == "ok" else f"site reports {code[:40]!r}"


def export_adapter(
    folder: Path, state: State, experiment: Experiment, tasks: Sequence[TaskSpace]
) -> Inference:
    """Return what ``inference.json`` says; write everything of an adapter folder
    (:class:`AdapterFolder`) but its card. No weight of the base model is read.

    All parts of ``state`` are stacked, so one PEFT adapter of the summed rank gives exactly the
    global model; directions that are zero in every layer are left out. A base model of the hub is
    named with the commit that was read. Where PEFT alone could not load the adapter
    (``AdapterKind.map_behind``, or components, of which one answers), PEFT's settings are left out.
    """
    experiment = experiment.changed(model={"name": pinned(experiment.model.name)})
    retained, current = state.retained, state.current
    if not is_nonzero(current):
        current = zero_adapter(current.shapes, 1, current.scaling)
    retained = split(retained, nonzero_rank(retained))[0]
    state = replace(state, retained=retained, current=current)
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
    alone = kind_of(experiment.adapter).map_behind is None  # PEFT finds its layers in the base
    if alone and not state.components:
        peft_config(merged, experiment).save_pretrained(str(folder))
    inference = _inference(state, experiment, tasks)
    atomic_write(files.inference, inference.model_dump_json(indent=2) + "\n")
    return inference


def peft_config(adapter: Adapter, experiment: Experiment) -> LoraConfig:
    """Return PEFT's settings of all adapters as one. An embedded base model has the name under
    which the hub has the same weights, where it has them."""
    name, revision = with_revision(experiment.model.name)
    if name.startswith(GIVEN):
        name = getattr(given(name).base, "name_or_path", "")
    name = upstream_of(name) if name in TO_THE_BIT else name
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank,
        target_modules=sorted(adapter.layers),
        base_model_name_or_path=name,
        revision=revision or None,
        task_type=family_of(experiment.model).task_type,
        inference_mode=True,
    )


def _inference(state: State, experiment: Experiment, tasks: Sequence[TaskSpace]) -> Inference:
    statistics = statistics_of(method_of(experiment)) if state.heads else None
    needs_float32 = experiment.privacy.mechanism != "none"
    precision = experiment.train.precision
    family, versions = family_of(experiment.model), {}
    logits = family.has_label_logits and not family.tags
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return Inference(
        model=experiment.model,
        adapter_kind=experiment.adapter.kind,
        upstream=upstream_of(experiment.model.name),
        task_type=family.task_type.value,
        pooling="mean" if logits else "none",
        max_length=experiment.train.max_length,
        precision="float32" if precision == "auto" and needs_float32 else precision,
        tasks=tuple(tasks),
        current_rank=state.current.rank,
        current_scaling=state.current.scaling,
        components=tuple(ComponentRows(tasks=own.tasks, rank=own.rank) for own in state.components),
        head_layers=statistics.layers if statistics is not None else 0,
        names_weight=statistics.names_weight(logits) if statistics is not None else 0.0,
        versions=versions,
    )


def task_spaces(experiment: Experiment, learnt: Sequence[str]) -> tuple[TaskSpace, ...]:
    """Return the label spaces of the stream's tasks, which are public; where all are declared, no
    data is read. ``learnt``: tasks that some client has worked on.

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


NOT_HERE = ", its weights are not in this folder"


def write_card(folder: Path, results: Results, inference: Inference) -> None:
    """Write ``README.md`` of an adapter folder."""
    atomic_write(AdapterFolder(folder).card, model_card(results, inference))


def model_card(results: Results, inference: Inference) -> str:
    """Return the card: what ``results.json`` and ``inference.json`` hold, and the date."""
    config, among_all = results.config, results.class_incremental

    def percent(found: Measures | None, place: int) -> str:
        if found is None or not found.accuracy_matrix:
            return "not known"
        return f"{100 * metrics.measured(found.accuracy_matrix, -1, place):.1f} %"

    def measure(task: str) -> str:
        name = results.measures.get(task, "accuracy")
        return "" if name == "accuracy" else f" ({TITLES[name]})"

    measures = [
        ("average accuracy", results.average_accuracy, "%"),
        ("backward transfer", results.backward_transfer, "points"),
        ("forward transfer", results.forward_transfer, "points"),
        ("forgetting", results.forgetting, "points"),
    ]
    if among_all is not None:
        measures += [
            ("Class-IL average accuracy", among_all.average_accuracy, "%"),
            ("Class-IL backward transfer", among_all.backward_transfer, "points"),
        ]
    made = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["text"] = as_text
    made.filters["cell"] = lambda words: as_text(words).replace("|", "\\|")
    made.filters["at_most"] = lambda value: rounded_up(value, 3)
    template = made.from_string(Path(__file__).with_name("model_card.jinja").read_text("utf-8"))
    card = template.render(
        results=results,
        inference=inference,
        config=config,
        model=inference.model,
        privacy=results.privacy,
        void=VOID,
        base=hub_name(inference),
        for_peft=choose("adapter_kind", inference.adapter_kind, KINDS).map_behind is None,
        encoder=inference.pooling == "mean",
        keeps_texts=config.method.name in KEEP_TEXTS,
        rule=rule_of(config.adapter, config.aggregation),
        among_all=among_all,
        percent=percent,
        measure=measure,
        measures=measures,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
    )
    return card.rstrip() + "\n"


def with_base(card: str, folder: str) -> str:
    """Return the card of a folder that has the base model in it, in ``folder``."""
    return card.replace(NOT_HERE, f", its weights are in `{folder}`", 1)


def with_use(card: str, use: str) -> str:
    """Return the card with another section on use."""
    before, heading, after = card.partition("## Versions\n")
    kept = before.partition("## Use\n")[0]
    return f"{kept}## Use\n\n{use}\n\n{heading}{after}"


def hub_name(inference: Inference) -> str:
    """Return the base model's name on the Hugging Face hub, without a revision; empty where it is a
    folder."""
    name = with_revision(inference.upstream or inference.model.name)[0]
    is_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~", "embedded:", GIVEN))
    return name if is_hub and not Path(name).exists() else ""


def as_text(words: str) -> str:
    """Return a user's words as one line that opens no section, tag or link."""
    line = " ".join(words.split()).replace("\\", "\\\\")
    return line.replace("<", "&lt;").replace("[", "\\[").lstrip("#")
