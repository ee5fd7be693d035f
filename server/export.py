"""What a run has learnt, as a folder that plain PEFT loads and ``deal predict`` answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from peft import LoraConfig
from safetensors.numpy import save

from deal_core.config.experiment import Experiment
from deal_core.data import open_source, public_labels
from deal_core.inference.folder import AdapterFolder, Inference, TaskSpace
from deal_core.lora.adapter import Adapter, is_nonzero, live_rank, split, stack, zero_adapter
from deal_core.lora.arrays import to_arrays
from deal_core.lora.kinds import kind_of
from deal_core.lora.state import State
from deal_core.methods import method_of, statistics_of, whole_heads
from deal_core.models import FAMILIES, has_label_logits
from deal_core.models.loading import TO_THE_BIT, pinned, upstream_of, with_revision
from deal_core.privacy.mechanisms.registry import mechanism_of
from deal_core.whole_file import write_whole

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
    write_whole(files.weights, save(arrays, {"format": "pt"}))
    files.heads.unlink(missing_ok=True)
    files.config.unlink(missing_ok=True)
    if state.heads:
        whole = whole_heads(state)
        heads = {task: np.ascontiguousarray(head.numpy()) for task, head in whole.items()}
        write_whole(files.heads, save(heads, {"format": "pt"}))
    if kind_of(experiment.adapter).map_behind is None:  # PEFT finds its layers in the base model
        peft_config(merged, experiment).save_pretrained(str(folder))
    inference = make_inference(state, experiment, tasks)
    write_whole(files.inference, inference.model_dump_json(indent=2) + "\n")
    return inference


def without_zero_directions(state: State) -> State:
    """Return the same model in as few directions as its parts are laid out in: what is retained
    without its last ones that are zero, and one in the place of a current adapter that is zero."""
    retained = split(state.retained, live_rank(state.retained))[0]
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
    needs_float32 = mechanism_of(experiment).needs_float32
    precision = experiment.train.precision
    return Inference(
        model=experiment.model,
        adapter_kind=experiment.adapter.kind,
        upstream=upstream_of(experiment.model.name),
        task_type=FAMILIES[experiment.model.family].task_type.value,
        pooling="mean" if has_label_logits(experiment.model) else "none",
        max_length=experiment.train.max_length,
        precision="float32" if precision == "auto" and needs_float32 else precision,
        tasks=tuple(tasks),
        shared_labels=experiment.stream.shared_labels,
        current_rank=state.current.rank,
        current_scaling=state.current.scaling,
        head_layers=statistics.layers if statistics is not None else 0,
        names_weight=statistics.names if statistics is not None else 0.0,
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
