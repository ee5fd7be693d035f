"""The table ``stream``: how tasks arrive."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deal_core.config.table import Table


class StreamConfig(Table):
    """How tasks arrive."""

    schedule: Literal["synchronous", "per-client", "joint"] = "synchronous"
    """``synchronous``: all clients work on one task at a time, in the order of ``data.tasks``;
    ``per-client``: each on its own tasks, in its own order; who is through idles (the keys below
    are for that); ``joint``: on all tasks at once, for the rounds of one (the bound that knows no
    sequence)."""
    consolidate_every: int = Field(0, ge=0)
    """Rounds from one consolidation, and evaluation, to the next; 0: ``federation.rounds``."""
    tasks_per_client: int = Field(0, ge=0)
    """Tasks that a client meets, drawn with their order by the seed; 0, or more than there are:
    all."""
    joint_labels: Literal["own", "all"] = "own"
    """With schedule ``joint``: whether an example's cross-entropy is over the labels of its own
    task, or over those of all tasks (the bound where the task is not told)."""
    shared_labels: bool = True
    """Whether labels of equal name in two tasks are one class, or two, where the answer is chosen
    among all labels seen so far (class-incremental accuracy)."""
    orders: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Number of a client (from 0) to its tasks in their order, instead of a draw; a task may
    return; an empty list: it only evaluates."""
    joins: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Number of a client (from 0) to the rounds of the run that are over when it joins; the others
    are there from the start. Where tasks come in turn for all it begins with the next task."""

    @model_validator(mode="after")
    def _joint_is_all_at_once(self) -> Self:
        if self.joint_labels == "all" and self.schedule != "joint":
            raise ValueError('joint_labels = "all" has an effect with schedule = "joint" alone')
        if self.joins and self.schedule == "joint":
            raise ValueError('nobody joins late with schedule = "joint"; leave joins out')
        return self

    @model_validator(mode="after")
    def _orders_are_per_client(self) -> Self:
        given = self.consolidate_every or self.tasks_per_client or self.orders
        if given and self.schedule != "per-client":
            raise ValueError(
                "consolidate_every, tasks_per_client and orders have an effect with schedule = "
                '"per-client" alone; set it, or leave them out'
            )
        return self

    def times(self, task: str) -> int:
        """Return how often a client meets a task, at most."""
        return max([1, *(order.count(task) for order in self.orders.values())])

    def turns(self, tasks: int) -> int:
        """Return how many tasks a client works on one after another, at most.

        Args:
            tasks: of the stream.
        """
        return max([tasks, *map(len, self.orders.values())])
