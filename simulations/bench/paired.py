"""Contestants of a benchmark in processes of their own, timed in turn.

A B C A B C …: what disturbs the machine for a while disturbs all of them, so their ratios hold
where their seconds do not. Each process has loaded only what its contestant needs, and its
peak memory is that contestant's.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from simulations.bench.measure import peak_resident


class Work(Protocol):
    """What a contestant does."""

    def window(self) -> Mapping[str, float]:
        """Do a fixed piece of work; return ``work`` done (any unit) and, where it knows better
        than a clock around it, ``seconds``."""

    def report(self) -> Mapping[str, float]:
        """After the last window, and not timed: whatever else is to be known."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: in the table.
        make: called with ``arguments`` in the new process; everything it does is set-up.
        arguments: picklable.
    """

    name: str
    make: Callable[..., Work]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Timed:
    """What one contestant did.

    Attributes:
        windows: ``work`` and ``seconds`` of each.
        peak_bytes: of its process, set-up included.
        report: see :class:`Work`.
    """

    name: str
    windows: tuple[Mapping[str, float], ...]
    peak_bytes: int | None
    report: Mapping[str, float]

    @property
    def rates(self) -> list[float]:
        """Work per second, window by window."""
        return [window["work"] / window["seconds"] for window in self.windows]

    @property
    def rate(self) -> float:
        """Median work per second."""
        return statistics.median(self.rates)


def ratios(first: Timed, second: Timed) -> list[float]:
    """Rate of the first over that of the second, pair by pair, sorted."""
    return sorted(a / b for a, b in zip(first.rates, second.rates, strict=True))


def timed_in_turn(
    contestants: Sequence[Contestant], windows: int, warm_up: int = 1
) -> dict[str, Timed]:
    """Start all processes, then give each in turn one window after the other.

    Returns:
        Name to what the contestant did, without the windows of the warm-up.

    Raises:
        RuntimeError: a contestant's process failed; the message has its error.
    """
    with ExitStack() as stack:
        lines = {each.name: _started(each, stack) for each in contestants}
        figures: dict[str, list[Mapping[str, float]]] = {name: [] for name in lines}
        for number in range(warm_up + windows):
            for name, line in lines.items():
                done = _asked(name, line, "window")
                if number >= warm_up:
                    figures[name].append(done)
        return {
            name: Timed(
                name,
                tuple(figures[name]),
                _asked(name, line, "peak"),
                _asked(name, line, "report"),
            )
            for name, line in lines.items()
        }


def _started(contestant: Contestant, stack: ExitStack) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, contestant.make, contestant.arguments)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(ours.close)
    _asked(contestant.name, ours, "ready")
    return ours


def _asked(name: str, line: Connection, question: str) -> Any:
    try:
        line.send(question)
        answer = line.recv()
    except (EOFError, BrokenPipeError):
        raise RuntimeError(f"benchmark '{name}': its process ended before its time") from None
    if isinstance(answer, Exception):
        raise RuntimeError(f"benchmark '{name}': {answer!r}") from answer
    return answer


def _serve(line: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """In the new process: set up, then answer until the other end is closed."""
    work: Work | None = None
    while True:
        try:
            question = line.recv()
        except EOFError:
            return
        try:
            if work is None:
                work = make(*arguments)
            line.send(_answer(question, work))
        except Exception as error:
            line.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _answer(question: str, work: Work) -> Any:
    if question == "peak":
        return peak_resident()
    if question == "report":
        return work.report()
    if question == "window":
        started = time.perf_counter()
        figures = work.window()
        return {"seconds": time.perf_counter() - started, **figures}
    return question
