"""The adapter folder: what a run has learnt, and what it takes to answer with it.

``adapter_model.safetensors`` and ``adapter_config.json`` are PEFT's. ``inference.json`` says what
PEFT does not know: label spaces, how texts are read, and how scores are made of both.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from deal_core.config.data import Table
from deal_core.config.experiment import ModelConfig
from deal_core.errors import UserError

SCHEMA: Literal[1] = 1
"""Version of ``inference.json``."""


class AdapterFolder:
    """Names inside the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "adapter_model.safetensors"  # all adapters as one, by PEFT's keys
        self.config = path / "adapter_config.json"  # PEFT's settings, if it can load the adapter
        self.heads = path / "heads.safetensors"  # a tensor for each task that has one
        self.inference = path / "inference.json"  # see Inference
        self.calibration = path / "calibration.json"  # task to temperature, once one was found
        self.card = path / "README.md"  # for people


@dataclass(frozen=True)
class Answer:
    """What a text is."""

    task: str
    """The one that was named, or the one whose label it is."""
    label: str
    """Of the largest score; of equal ones the first."""
    probability: float
    """Softmax of the scores over the labels that were to choose from, divided by the temperature of
    a calibration where there is one."""
    runner_up: str | None
    """The second; None where there was one label alone."""
    runner_up_probability: float | None
    log_probabilities: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    """Of every label that was to choose from."""


@dataclass(frozen=True)
class Written:
    """What a model has written to a text of a task, up to its end or ``model.max_new_tokens``; of
    words that have tags the text, each entity marked: ``[Ann Lee](patient)``."""

    task: str
    answer: str


class TaskSpace(Table):
    """A task's label space."""

    name: str
    labels: tuple[str, ...]
    """In the order of the rows of its head; none: answers are texts."""
    learnt: bool = True
    """Whether some client has worked on it; otherwise its labels are answers only where the task is
    named."""
    instruction: str = ""
    """What the prompt of a generating model asks for; empty: that of ``model``."""


class ComponentRows(Table):
    """Rows of the adapter that answer some tasks alone."""

    tasks: tuple[str, ...]
    rank: int


class Inference(Table):
    """``inference.json``."""

    schema_version: Literal[1] = SCHEMA
    model: ModelConfig
    """Base model as the experiment names it, family, template."""
    adapter_kind: str = "lora"
    upstream: str = ""
    """Hub name that an embedded base model comes from; empty: the name says it."""
    task_type: str
    """PEFT's name of the family."""
    pooling: Literal["mean", "none"]
    """How token states become the embedding that names of labels are compared with; ``none``: the
    family answers in words."""
    max_length: int
    """Tokens kept of a text."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Of the frozen model in evaluations; ``auto``: by the hardware."""
    tasks: tuple[TaskSpace, ...]
    """In the stream's order."""
    current_rank: int
    """So many directions of the adapter, the last ones, were computed beside the frozen weights in
    evaluations, and the others added to them: sums that differ by rounding."""
    current_scaling: float
    """Factor that these were computed with; ``lora_B`` holds it."""
    head_layers: int = 0
    """Of how many of the base model's last layers the embeddings are made that heads score; 0:
    there are no heads."""
    names_weight: float = 0.0
    """What scores of label names weigh beside those of heads."""
    components: tuple[ComponentRows, ...] = ()
    """Of the adapter, from its first row on; none: all of it answers. A router chooses one for a
    text: the task whose head scores the text alone, without a prompt, highest."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the packages at the server."""

    def instruction(self, task: str) -> str:
        """Return what the prompt of a task asks for; empty: the usual."""
        return next((each.instruction for each in self.tasks if each.name == task), "")

    @property
    def learnt(self) -> dict[str, tuple[str, ...]]:
        """Learnt tasks, in the stream's order, to their labels."""
        return {task.name: task.labels for task in self.tasks if task.learnt}

    @property
    def all_tasks(self) -> dict[str, tuple[str, ...]]:
        """All tasks, in the stream's order, to their labels."""
        return {task.name: task.labels for task in self.tasks}


def find_adapter(path: Path) -> AdapterFolder:
    """Return the adapter folder of a run folder, or the folder itself.

    Raises:
        UserError: there is none.
    """
    for folder in (AdapterFolder(path / "adapter"), AdapterFolder(path)):
        if folder.inference.is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder, or its adapter folder")
    raise UserError(
        f"{path}: no adapter/inference.json; the run has not finished (see --resume), or an older "
        "version has written it: then run it again"
    )


def read_inference(folder: AdapterFolder) -> Inference:
    """Return ``inference.json``, checked.

    Raises:
        UserError: not valid, or of another version.
    """
    path = folder.inference
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version not in (SCHEMA, None):
            raise UserError(
                f"{path}: of schema version {version}, not {SCHEMA}; use the version of deal that "
                "has written it"
            )
        return Inference.model_validate(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not valid ({reason}); run the experiment again") from None
