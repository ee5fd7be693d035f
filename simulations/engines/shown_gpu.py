"""Which GPU a process is shown: each of several has one of its own, as far as there are."""

from __future__ import annotations

import os
from collections.abc import Mapping

SHOWN = "CUDA_VISIBLE_DEVICES"


def gpus_here() -> int:
    """Return how many GPUs torch sees; it loads here."""
    import torch

    return torch.cuda.device_count()


def shown_gpu(place: int, gpus: int) -> dict[str, str]:
    """Return what goes into the environment of a process before it uses CUDA; nothing where there
    is no choice.

    Args:
        place: number of the process among those that work side by side, from 0.
        gpus: that torch sees here.
    """
    return of_those(place, gpus, os.environ)


def of_those(place: int, gpus: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the same, of the GPUs that ``environment`` shows."""
    if gpus < 2:
        return {}
    names = environment.get(SHOWN, "").split(",")
    known = names if len(names) == gpus else [str(number) for number in range(gpus)]
    return {SHOWN: known[place % gpus]}
