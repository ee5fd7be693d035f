"""The tables ``data`` and ``stream``: where rows come from, who holds them, how tasks arrive."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Table(BaseModel):
    """Base of every table: frozen; an unknown key is an error, and so is a number without end,
    which JSON cannot hold."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Check that the labels of a task can be told apart: those of rows are read without blanks."""
    for place, label in enumerate(labels):
        if not label.strip():
            raise ValueError("an empty label; leave it out")
        if label != label.strip():
            raise ValueError(f"the label '{label}' with blanks around it; remove them")
        if label in labels[:place]:
            raise ValueError(f"the label '{label}' twice; leave one out")
    return labels


def _named(label_text: dict[str, str]) -> dict[str, str]:
    """Check that no value stands for an empty label."""
    for value, label in label_text.items():
        if not label.strip():
            raise ValueError(f"'{value}' stands for an empty label; name it")
    return label_text


LabelText = Annotated[dict[str, str], AfterValidator(_named)]
"""Value in a label column to the label that it stands for."""
Labels = Annotated[tuple[str, ...], AfterValidator(_distinct)]
"""Of a task; none: its answers are texts."""


ENTITY_F1: Literal["entity-f1"] = "entity-f1"
MeasureName = Literal["rouge-l", "rouge-1", "exact-match", "entity-f1"]
"""How near an answer that is a text is to the right one (:mod:`deal_core.training.text_overlap`);
or F1 of entities that tags of words mark (:mod:`deal_core.data.tags`)."""


class PartitionConfig(Table):
    """How one data set is divided among simulated clients."""

    kind: str = "dirichlet"
    """``iid``, ``dirichlet``, ``quantity`` or ``column``."""
    alpha: float = Field(0.5, gt=0)
    """Dirichlet concentration over labels, or (quantity) over clients' sizes: small is skewed,
    large is uniform."""
    column: str = ""
    """The column whose values name the client (column); more values than clients take turns."""


class TaskColumns(Table):
    """Columns of one task's files, where they are not those of the others."""

    text_column: str = ""
    """Empty: ``data.text_column``."""
    pair_column: str = ""
    """Empty: ``data.pair_column``."""
    label_column: str = ""
    """Empty: ``data.label_column``."""
    label_text: LabelText = Field(default_factory=dict)
    """Value in the label column (as text) to the label it stands for; empty: as they are."""
    target_column: str = ""
    """Column of the answer, where answers are texts; empty: ``data.target_column``."""
    references_column: str = ""
    """Column of further right answers, a list (JSONL, Parquet), or one text; empty: none."""


class HubTask(TaskColumns):
    """One task read with ``datasets.load_dataset``; its labels without ``label_text`` are the data
    set's names."""

    path: str
    """First argument of ``load_dataset``: a name on the hub, or a folder."""
    config: str = ""
    """Second argument of ``load_dataset``; empty: the data set has one configuration."""
    train_split: str = "train"
    """Split that clients train on."""
    test_split: str = "test"
    """Split that accuracy is counted on."""


class DataConfig(Table):
    """Where the stream of tasks comes from."""

    source: str = "medmcqa"
    """``medmcqa`` (embedded), ``embedded`` (the same, and tasks that write or tag words),
    ``files``, ``hub``, or ``sites``: each site has its own, and says where (deployment)."""
    path: str = ""
    """Folder that holds one folder per task (files). One that is not absolute is looked for in the
    working directory first, and then beside the experiment file."""
    public_path: str = ""
    """File of public texts, the same at every site: JSONL, CSV or Parquet with ``text_column``, or
    plain text with one text a line. They give the directions in which class sums are added up;
    empty: what is embedded, or names of labels where that is not installed."""
    split: float = Field(0.0, ge=0, lt=1)
    """Share of a task's training file that becomes its test examples, where it has no test file:
    of every label, and the same rows in every run; 0: a test file is needed (files)."""
    tasks: tuple[str, ...] = ()
    """Tasks in the order they are learnt; empty: all, in the source's order."""
    generation: tuple[str, ...] = ()
    """Tasks whose answer is a text, ``target_column``, instead of a label (generating models;
    files, hub, sites); see ``measures``."""
    measures: dict[str, MeasureName] = Field(default_factory=dict)
    """Task of ``generation`` to how an answer is measured: ``rouge-l``, ``rouge-1`` or
    ``exact-match`` (case and punctuation left out); a task that is not named: ``rouge-l``; and of
    tasks whose rows are two lists, ``tokens`` and ``tags`` (O, B-LABEL, I-LABEL): ``entity-f1``."""
    labels: dict[str, Labels] = Field(default_factory=dict)
    """Task name to its labels (files, sites): the words that all clients share, needed where
    nobody sees all data; a task that is not named has those of its training file (files)."""
    instructions: dict[str, str] = Field(default_factory=dict)
    """Task name to what its prompt asks for, or with ``{text}`` in it to its whole prompt in the
    place of ``model.template`` (generating models); a task that is not named is asked to "Classify
    the text. Answer with one of the options."."""
    text_column: str = "text"
    """Column of the text (files, hub)."""
    pair_column: str = ""
    """Second text column, joined to the first; words before a column in braces stand before its
    text (``"Question: {question}"``); empty: none."""
    label_column: str = "label"
    """Column of the label (files, hub)."""
    target_column: str = "target"
    """Column of the answer, where it is a text."""
    id_column: str = ""
    """Whose record it is (a patient's number): what is compared where a site declares that no
    record is in two tasks; empty: the text itself."""
    max_train: int = Field(0, ge=0)
    """Training examples per task over all clients; 0: no limit."""
    max_test: int = Field(0, ge=0)
    """Test examples per task over all clients; 0: no limit."""
    partition: PartitionConfig = PartitionConfig()
    files: dict[str, TaskColumns] = Field(default_factory=dict)
    """Task name to its own columns (files)."""
    hub: dict[str, HubTask] = Field(default_factory=dict)
    """Task name to the hub data set behind it (hub)."""

    def measure(self, task: str) -> Literal["accuracy"] | MeasureName:
        """Return how answers are measured."""
        return self.measures.get(task, "rouge-l" if task in self.generation else "accuracy")

    def tagged(self, task: str) -> bool:
        """Return whether its answers are tags of words."""
        return self.measures.get(task) == ENTITY_F1


class StreamConfig(Table):
    """How tasks arrive."""

    schedule: Literal["synchronous", "per-client", "joint", "joint-all-labels"] = "synchronous"
    """``synchronous``: all clients work on one task at a time, in the order of ``data.tasks``;
    ``per-client``: each on its own tasks, in its own order; who is through idles (the keys below
    are for that); ``joint``: joint training on all tasks at once, for the rounds of one, each
    example over the labels of its own task; ``joint-all-labels``: over those of all tasks (the
    bounds of Task-IL and of Class-IL)."""
    consolidate_every: int = Field(0, ge=0)
    """Rounds from one consolidation, and evaluation, to the next; 0: ``federation.rounds``."""
    orders: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Number of a client (from 0) to its tasks in their order, some or all, and a task may return;
    an empty list: it only evaluates. A client that is not named meets all, in an order that the
    seed draws."""
    evaluate_every: int = Field(1, ge=1)
    """Stages from one evaluation on all tasks to the next; the last stage always has one. After the
    others a task is evaluated where a measure needs it: just learnt, or next to be learnt. Of 15
    tasks, 3 leaves out more than half of all evaluations."""
    joins: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Number of a client (from 0) to the rounds of the run that are over when it joins; the others
    are there from the start. Where tasks come in turn for all it begins with the next task."""

    @model_validator(mode="after")
    def _keys_of_the_schedule(self) -> Self:
        if self.joins and self.at_once:
            raise ValueError(f'joins has no effect with schedule = "{self.schedule}"; leave it out')
        if (self.consolidate_every or self.orders) and self.schedule != "per-client":
            raise ValueError(
                'consolidate_every and orders have an effect with schedule = "per-client" alone; '
                "set it, or leave them out"
            )
        return self

    @property
    def at_once(self) -> bool:
        """Whether all tasks are learnt at once: joint training."""
        return self.schedule.startswith("joint")

    def times(self, task: str) -> int:
        """Return how often a client meets a task, at most."""
        return max([1, *(order.count(task) for order in self.orders.values())])

    def turns(self, tasks: int) -> int:
        """Return how many tasks a client works on one after another, at most.

        Args:
            tasks: of the stream.
        """
        return max([tasks, *map(len, self.orders.values())])
