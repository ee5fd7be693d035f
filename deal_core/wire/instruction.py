"""What the server asks of a client, beside the adapters: names and numbers, never data; and what
all clients of a sum are asked alike."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deal_core.lora.payload import PayloadError
from deal_core.lora.state import Component, State, to_arrays

LEARN = "learn"
"""The first phase of every task."""
RECORD = "instruction"
"""Name of the record that carries it."""
NAMES = ("tasks", "seen", "future", "past", "learnt", "trained")
"""Fields that are lists of names."""


class Instruction(BaseModel):
    """One request: all that a client must know of the plan.

    Attributes:
        task: what the client works on; empty in an evaluation request.
        stage: number of the stage, from 0; -1 before anything is learnt.
        server_round: from 1 in every stage, counting on from phase to phase; 0 in an evaluation
            request.
        tasks: to be evaluated, in order; in a training request, to be learnt at once (``task`` is
            the first).
        seen: other tasks that some client had met before the stage, in the stream's order; in
            phases after learning, those of the stage as well.
        future: tasks that no client works on before the stage has ended.
        past: tasks that this client worked on before, in its own order; where a task returns, that
            task as well.
        learnt: tasks that some client had worked on when the model that is evaluated was made, in
            the stream's order: class-incremental accuracy is among their labels as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    stage: int = Field(ge=-1)
    server_round: int = Field(ge=0)
    phase: str = LEARN
    """What the round is for: one of the method's phases."""
    tasks: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    future: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    learnt: tuple[str, ...] = ()
    trained: tuple[Literal["lora_A", "lora_B"], ...] = ("lora_A", "lora_B")
    rank: int = Field(ge=1)
    retained_rank: int = Field(ge=1)
    residual_rank: int = Field(0, ge=0)
    """Rows of the record ``residual``; 0: there is none."""
    retained_digest: str = Field("", pattern="^([0-9a-f]{64})?$")
    """Digest of the record ``retained``, which is left out where the client has it."""
    retained_rows: int = Field(1, ge=1)
    """Rows of that record; those up to ``retained_rank`` that are not sent are zero."""
    num_reference_directions: int = Field(0, ge=0)
    """First rows of the retained record that only show the start of the task (see ``State``)."""
    component_ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Rows of each component of the retained adapter, in their order; none: it is one sum."""
    component_tasks: tuple[str, ...] = ()
    """Tasks that each of them answers, separated by line breaks."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for field in NAMES:  # records of a task that is named twice would be read, and count, twice
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{field} names something twice")
        if self.num_reference_directions > self.retained_rank:
            raise ValueError("more reference directions than there are")
        if self.retained_rows > self.retained_rank:
            raise ValueError("more rows than are retained")
        if len(self.component_ranks) != len(self.component_tasks):
            raise ValueError("components without tasks")
        if sum(self.component_ranks) > self.retained_rank:
            raise ValueError("more rows of components than are retained")
        return self

    @property
    def components(self) -> tuple[Component, ...]:
        """Of the retained adapter."""
        each = zip(self.component_tasks, self.component_ranks, strict=True)
        return tuple(Component(tuple(names.split("\n")), rank) for names, rank in each)

    def to_config(self) -> dict[str, Any]:
        """Return plain scalars and lists; empty lists stay out (Flower cannot type them)."""
        values = self.model_dump()
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value != ()
        }


def read_instruction(config: Mapping[str, Any]) -> Instruction:
    """Return the instruction that ``to_config`` made plain.

    Raises:
        PayloadError: a field is missing, unknown or of the wrong type.
    """
    try:
        return Instruction.model_validate(dict(config))
    except ValidationError as error:
        problem = error.errors()[0]
        raise PayloadError(f"instruction: {problem['loc']}: {problem['type']}") from None


OF_ONE_CLIENT = frozenset({"past", "retained_digest", "retained_rows"})
"""Fields of an instruction that need not be equal: its own past, and how the retained adapter
travelled, which is compared itself."""
OF_ITS_TASK = frozenset({"task", "seen"})
"""Likewise, where each client has its own order of tasks."""


def transcript_hash(instruction: Instruction, state: State, own_tasks: bool) -> str:
    """Return a digest, hexadecimal, of a request and the state that it brings, as far as it is the
    same for all; ``own_tasks``: whether each client works on a task of its own."""
    apart = OF_ONE_CLIENT | (OF_ITS_TASK if own_tasks else frozenset())
    apart |= {"learnt"} if instruction.task else frozenset()  # of the counts
    arrived = read_instruction(instruction.to_config())  # empty lists do not travel
    asked = arrived.model_dump(mode="json", exclude=set(apart))
    hashed = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    parts = {"current": state.current, "retained": state.retained, "residual": state.residual}
    for name, adapter in parts.items():
        hashed.update(_digest(name, {} if adapter is None else to_arrays(adapter)))
    heads = {task: head.detach().cpu().numpy() for task, head in state.heads.items()}
    hashed.update(_digest("heads", heads))
    return hashed.hexdigest()


def _digest(name: str, arrays: Mapping[str, ArrayLike]) -> bytes:
    """Of named arrays as float32; both zeros are one, since rows of zeros are not sent."""
    hashed = hashlib.sha256(name.encode())
    for key in sorted(arrays):
        values = np.asarray(arrays[key], np.float32) + np.float32(0)
        hashed.update(json.dumps([key, values.shape]).encode())
        hashed.update(np.ascontiguousarray(values).tobytes())
    return hashed.digest()
