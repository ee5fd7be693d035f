"""Singular values of what a run has learnt, from its adapter file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deal_core.inference.folder import AdapterFolder
from server.folder import RunFolder

A, B, PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one layer's update, the largest first."""

    layer: str
    values: tuple[float, ...]

    def directions(self, share: float) -> int:
        """Return how many directions hold ``share`` of the squared length."""
        squares = np.cumsum(np.square(self.values))
        if not squares[-1]:
            return 0
        return int(np.searchsorted(squares, share * squares[-1] * (1 - 1e-12)) + 1)

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(np.linalg.norm(self.values))


@dataclass(frozen=True)
class Spectrum:
    """Of all adapted layers.

    Attributes:
        rank: of the file: retained and current adapter stacked.
        current_rank: of these, the current adapter's; None: the file does not say.
    """

    layers: tuple[LayerSpectrum, ...]
    rank: int
    current_rank: int | None


def read_spectrum(run: RunFolder) -> Spectrum | None:
    """Return the spectrum of the adapter in a run folder; None: there is none, or it cannot be
    read, which must not cost the page."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files = AdapterFolder(run.adapter)
    if not files.weights.is_file():
        return None
    try:
        arrays = load_file(files.weights)
    except (OSError, SafetensorError):
        return None
    layers = tuple(
        LayerSpectrum(
            key.removeprefix(PREFIX).removesuffix(A),
            singular_values(arrays[key], arrays[key.removesuffix(A) + B]),
        )
        for key in sorted(arrays)
        if key.endswith(A) and key.removesuffix(A) + B in arrays
    )
    if not layers:
        return None
    rank = max(arrays[key].shape[0] for key in arrays if key.endswith(A))
    return Spectrum(layers, rank, _current_rank(files.inference))


def singular_values(down: np.ndarray, up: np.ndarray) -> tuple[float, ...]:
    """Return those of ``up @ down`` without making that matrix.

    Args:
        down: ``lora_A``, rank by inputs.
        up: ``lora_B``, outputs by rank.
    """
    of_inputs = np.asarray(np.linalg.qr(down.astype(np.float64).T, mode="r"))
    of_outputs = np.asarray(np.linalg.qr(up.astype(np.float64), mode="r"))
    found = np.linalg.svd(of_outputs @ of_inputs.T, compute_uv=False)
    return tuple(float(value) for value in found)


def _current_rank(path: Path) -> int | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8")).get("current_rank")
    except (OSError, ValueError, AttributeError):
        return None
    return told if isinstance(told, int) else None
