"""What the benchmarks share: contestants timed in turn, their memory, and where figures go.

A B C A B C …: what disturbs the machine for a while disturbs all of them, so their ratios hold
where their seconds do not. Each contestant has a process of its own, whose peak memory is its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

Window = Callable[[], Mapping[str, float]]
"""Does a piece of work; returns ``work`` (any unit), ``seconds``, and what else is to be known."""
Row = Mapping[str, Any]
PRELOADED = ["opacus", "peft", "transformers", "deal_core.training.loop"]  # once for all


@dataclass(frozen=True)
class Contestant:
    """One way to do the work: ``make`` is called with ``arguments`` in a new process, and what it
    does is set-up."""

    name: str
    make: Callable[..., Window]
    arguments: tuple[Any, ...] = ()


_own: list[Window] = []  # in a contestant's process: what it does


def _start(contestant: Contestant) -> None:
    _own.append(contestant.make(*contestant.arguments))


def _window() -> Mapping[str, float]:
    return _own[-1]()


def measured(function: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a window in which a function is called."""
    started = time.perf_counter()
    function()
    return {"seconds": time.perf_counter() - started}


def peak() -> float:
    """Return the largest memory of this process so far, in MB: of the GPU, or resident (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


class Figures:
    """The command line of a benchmark, and its tables: shown as they come, and kept in a JSON file,
    which is written before anything is measured."""

    def __init__(self, name: str, description: str | None, given: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(description=description)
        what = "small: seconds, to see that it works; full: what the pages quote, up to hours"
        parser.add_argument(
            "--size", choices=("small", "usual", "full"), default="usual", help=what
        )
        parser.add_argument("--out", default=f"build/benchmarks/{name}.json", help="a JSON file")
        asked = parser.parse_args(given)
        self.size: str = asked.size
        self._path, self._tables = Path(asked.out), dict[str, Sequence[Row]]()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, title: str, rows: Sequence[Row]) -> None:
        """Show a table, a line a row, and write it."""
        self._tables[title] = rows
        self._write()
        table = pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format)
        print(f"\n{title}\n{table}", flush=True)

    def race(
        self, title: str, contestants: Sequence[Contestant], windows: int = 2, warm_up: int = 1
    ) -> None:
        """Start all contestants, give them one window after the other in turn, and show what they
        did: ratios are to the first, of rates pair by pair; memory is that of the process."""
        with ExitStack() as stack:
            forked = multiprocessing.get_context("forkserver")
            forked.set_forkserver_preload(PRELOADED)
            own = [stack.enter_context(ProcessPoolExecutor(1, forked)) for _ in contestants]
            for process, each in zip(own, contestants, strict=True):
                process.submit(_start, each).result()
            count = warm_up + windows
            turns = [[process.submit(_window).result() for process in own] for _ in range(count)]
            del turns[:warm_up]
            peaks = [process.submit(peak).result() for process in own]
        rates = [[done["work"] / done["seconds"] for done in turn] for turn in turns]
        ratios = [[rate / turn[0] for rate in turn] for turn in rates]
        rows = [
            {
                "contestant": each.name,
                "per second": median(turn[n] for turn in rates),
                "ratio": median(turn[n] for turn in ratios),
                "least": min(turn[n] for turn in ratios),
                "most": max(turn[n] for turn in ratios),
                "MB": peaks[n],
                "memory": peaks[n] / peaks[0],
                **turns[-1][n],
            }
            for n, each in enumerate(contestants)
        ]
        self.add(title, rows)

    def _write(self) -> None:
        described = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
            **{name: version(name) for name in ("torch", "numpy", "flwr")},
        }
        text = json.dumps({"machine": described, "tables": self._tables}, indent=1)
        self._path.write_text(text + "\n", encoding="utf-8")
