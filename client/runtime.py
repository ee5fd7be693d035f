"""The heavy things of one process: the model, the method, the tokenised tasks; and what a client
tries out on constant texts before it reads records.

Simulated clients in one process share one runtime: one frozen base model, whose adapters
are swapped in for each request. Nothing in it depends on which client asked before.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from deal_core.config.experiment import Experiment
from deal_core.data import Example, TaskData, declared_labels, load_for_clients, open_source
from deal_core.data.partition import partition
from deal_core.deal.distillation import CACHED_FLOATS
from deal_core.deal.interface import LocalTask, Phase, Statistics, phases_of, statistics_of
from deal_core.lora.attach import at_task_start, read, set_trainable
from deal_core.methods import method_of
from deal_core.models import embedding_size, load_model
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import Encoded, LanguageModel, require_stateless, text_alone
from deal_core.models.loading import best_device
from deal_core.privacy.dpsgd import Sampled
from deal_core.privacy.events import GROUP
from deal_core.privacy.interface import Mechanism, RecordId, rehearsing
from deal_core.protection import make_mechanism
from deal_core.training.evaluation import base_embeddings, embeddings_alone
from deal_core.training.hardware import compute_dtype, keep_memory
from deal_core.training.loop import Cache, Objective, run_local_steps
from deal_core.training.public_subspace import Subspace

HELD_BACK = 10
"""One training record in so many is held back where class means are checked with it; none of
fewer."""
PROBE_TEXTS = ("The first of two texts on which nothing depends.", "Another one.")
"""Constant texts: what a model makes of them tells nothing of a record."""


@dataclass(frozen=True)
class ClientTask:
    """One client's share of one task, tokenised; ``cache`` is for what follows from it."""

    labels: tuple[str, ...]
    train: Sequence[Encoded]
    test: Sequence[Encoded]
    cache: Cache
    held: Sequence[Encoded] = ()
    """Training examples that are held back: nothing is learnt from them, and no sum has them."""
    record_ids: Sequence[RecordId] = ()
    """Which record each training example is."""
    train_groups: Sequence[int] = ()
    """Group of each training example, from 0 as they occur; without groups: empty."""


class ClientRuntime:
    """Built once for an experiment; loads each part when it is first needed."""

    def __init__(
        self,
        experiment: Experiment,
        mechanism: Callable[[Experiment], Mechanism] = make_mechanism,
        prepare: Callable[[list[TaskData]], list[TaskData]] = lambda shares: shares,
        *,
        whole: bool = False,
        on_left_out: Callable[[str, int], None] = lambda task, rows: None,
    ) -> None:
        """Load nothing yet.

        Args:
            experiment: what the run is.
            mechanism: builds the privacy mechanism.
            prepare: changes the clients' shares of a task before they are used; an audit plants
                canaries in them.
            whole: all data that the source has is this client's (a site); nothing is divided.
            on_left_out: hears of rows of a task that could not be used.
        """
        self.experiment = experiment
        self.whole = whole
        self._make_mechanism = mechanism
        self._prepare = prepare
        self._on_left_out = on_left_out
        self.latest = Cache()
        """What the latest request was decoded to: the next client is often sent the same."""
        self.take_steps = run_local_steps
        """The loop of local training; another one trains without a mechanism alone."""
        self._shares: dict[str, list[TaskData]] = {}
        self._tasks: dict[tuple[str, int], ClientTask] = {}
        self._labels: dict[str, tuple[str, ...]] = {}
        self.learning = Cache()
        """By client, a cache of the task that it learns; that of the task before is dropped: a
        teacher's answers are as large as its vocabulary."""

    @cached_property
    def model(self) -> LanguageModel:
        """The one model of the process, with the thread count fixed: it changes rounding."""
        config = self.experiment
        torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
        keep_memory()
        dtype = compute_dtype(config.train, best_device(), config.privacy.mechanism != "none")
        model = load_model(config.model, config.adapter, config.train.max_length, dtype)
        if config.privacy.mechanism != "none":
            require_stateless(model, config.model.name, config.train.max_length)
            if isinstance(model, GeneratingModel):
                model.keep_nothing()
        return model

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to ``(d_out, d_in)``: what an adapter must fit."""
        return read(self.model.module).shapes

    @cached_property
    def phases(self) -> dict[str, Phase]:
        """Name to phase of the experiment's method."""
        return phases_of(method_of(self.experiment))

    @cached_property
    def statistics(self) -> Statistics | None:
        """What the experiment's method adds up over records, and answers with; None: nothing."""
        return statistics_of(method_of(self.experiment))

    @cached_property
    def mechanism(self) -> Mechanism:
        """The privacy mechanism of the experiment."""
        return self._make_mechanism(self.experiment)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """All tasks of the run, and no others: what a request may name."""
        return open_source(self.experiment.data).task_names()

    @cached_property
    def grouped(self) -> bool:
        """Whether groups of records are protected, and not each by itself."""
        return self.mechanism.unit == GROUP

    def units(self, client: int) -> dict[str, int]:
        """Return how many training records, or groups of them, a client has of every task."""
        return {task: self._own(task, client).units(self.grouped) for task in self.tasks}

    def site_units(self, client: int) -> int:
        """Return how many it has, whatever tasks the run names; one of several tasks counts in
        each."""
        others = self.experiment.data.labels if self.whole else ()
        tasks = dict.fromkeys((*self.tasks, *others))
        return sum(self._own(task, client).units(self.grouped) for task in tasks)

    def ids(self, task: str, client: int) -> list[str]:
        """Return whose a client's training records of a task are."""
        return [example.whose for example in self._own(task, client).train]

    def labels(self, task: str) -> tuple[str, ...]:
        """Return the public label space of a task; where it is declared, no data is read."""
        if task not in self._labels:
            declared = declared_labels(self.experiment.data, task)
            self._labels[task] = self._share(task)[0].labels if declared is None else declared
        return self._labels[task]

    def instruction(self, task: str) -> str:
        """Return what the prompt of a task asks for; empty: the usual."""
        return self.experiment.data.instructions.get(task, "")

    def probes(self, labels: tuple[str, ...], instruction: str = "") -> Sequence[Encoded]:
        """Return constant texts, tokenised, under the first of the labels, or by themselves."""
        label = labels[0] if labels else ""
        examples = [Example(text, label, target=text) for text in PROBE_TEXTS]
        return self.model.encode(examples, labels, instruction)

    def longest(self, labels: tuple[str, ...], instruction: str = "") -> Sequence[Encoded]:
        """Return one constant text, tokenised, as long as the run lets a text be, under the longest
        of the labels; answered as long as an answer may be where there are none. Asked for the
        same, no record needs more memory than it."""
        config, model = self.experiment, self.model
        text = "word " * max(config.train.max_length, config.model.max_new_tokens)
        length = model.answer_length if isinstance(model, GeneratingModel) else len
        label = max(labels, key=length, default="")
        return model.encode([Example(text, label, target=text)], labels, instruction)

    def rehearse_gradients(
        self,
        objective: Callable[[LocalTask], Objective],
        task: LocalTask,
        trained: frozenset[str],
        gradients: Sampled,
    ) -> None:
        """Let the mechanism try its gradients out on constant texts: what cannot work fails here,
        and no record has to do with it. One of them is as long as a text may be, under the prompt
        of the task and of each earlier one; passes that several records share are tried out, too:
        where the machine has too little memory, it dies here. The model holds the adapters of the
        round.

        Args:
            objective: what is differentiated, of a task.
            task: the one at hand.
            trained: factors that learn, from now on.
            gradients: of the mechanism.

        Raises:
            RehearsalFailed: it does not work.
        """
        model, module = self.model, self.model.module
        with rehearsing():
            room = torch.ones(CACHED_FLOATS, device=model.device)  # for a teacher's answers
            labels = tuple(task.labels)
            longest = self.longest(labels, task.instruction)
            probes = [*self.probes(labels, task.instruction), *longest]
            alone = replace(task, data=probes, cache=Cache(), past=None, round_state=None)
            set_trainable(module, trained)
            gradients.rehearse(module, objective(alone), len(probes))
            asked = () if model.has_label_logits else task.prompts
            for prompt in asked:  # a text is asked about under one of them, whichever it is
                under = replace(
                    alone, data=longest, cache=Cache(), seen=(prompt.labels,), prompts=(prompt,)
                )
                gradients.rehearse(module, objective(under), len(longest))
                if prompt.labels or not isinstance(model, GeneratingModel):
                    continue
                texts = self.longest((), prompt.instruction)
                # The teacher's answer to a constant text may be short, and to a record so long.
                with at_task_start(module):
                    model.written(texts, to_the_end=True)
                writing = replace(
                    under, data=texts, cache=Cache(), labels=(), instruction=prompt.instruction
                )
                gradients.rehearse(module, objective(writing), len(texts))
            del room

    def rehearse_embeddings(self, task: str, layers: int) -> None:
        """Embed the longest text that there may be, before the records of a task are."""
        with rehearsing():
            longest = self.longest(self.labels(task), self.instruction(task))
            base_embeddings(self.model, longest, layers)

    def task(self, task: str, client: int) -> ClientTask:
        """Return the share of ``client`` (0 to clients - 1) in ``task``, tokenised once."""
        if (task, client) not in self._tasks:
            share = self._own(task, client)
            asks = share.labels, self.instruction(task)
            enough = share.labels and len(share.train) >= HELD_BACK
            # To see what class means beside names are worth.
            checked = self.statistics is not None and self.statistics.names
            every = HELD_BACK if checked and enough and self.mechanism.unit is None else 0
            held = share.train[::every] if every else ()
            rows = [row for row in range(len(share.train)) if not every or row % every]
            train, known = [share.train[row] for row in rows], dict[str, int]()
            numbers = [known.setdefault(example.unit, len(known)) for example in train]
            self._tasks[task, client] = ClientTask(
                share.labels,
                self.model.encode(train, *asks),
                self.model.encode(share.test, *asks),
                Cache(),
                self.model.encode(held, *asks),
                [RecordId(task, row) for row in rows],
                [] if "" in known else numbers,
            )
        return self._tasks[task, client]

    def vectors(
        self, share: ClientTask, part: Literal["train", "test"], statistics: Statistics
    ) -> Tensor:
        """Return what the frozen base model makes of a share's training or test texts, as
        ``statistics`` see them, ``(examples, size)``; made once, for nothing changes them."""
        data, layers = share.train if part == "train" else share.test, statistics.layers
        if statistics.routes:
            data = [text_alone(each) for each in data]

        def embed() -> Tensor:
            if self.mechanism.unit is None:
                embedded = base_embeddings(self.model, data, layers)
            else:
                size = embedding_size(self.experiment.model, layers)
                embedded = embeddings_alone(self.model, data, layers, size)
            return self.subspace.project(embedded)

        vectors: Tensor = share.cache.get_or_compute(f"vectors {part}", layers, embed)
        return vectors

    @cached_property
    def subspace(self) -> Subspace:
        """The public directions in which records are added up; from texts at this client."""
        assert self.statistics is not None
        spaces = list(map(self.labels, self.tasks))
        return self.statistics.subspace(self.experiment.data, self.model, spaces)

    def _own(self, task: str, client: int) -> TaskData:
        return self._share(task)[0 if self.whole else client]

    def _share(self, task: str) -> list[TaskData]:
        if task not in self._shares:
            config = self.experiment
            data, shares = load_for_clients(config, task), config.federation.clients
            if data.left_out:
                self._on_left_out(task, data.left_out)
            divided = [data]
            if not self.whole:
                divided = partition(data, config.data.partition, shares, config.run.seed)
            self._shares[task] = self._prepare(divided)
        return self._shares[task]
