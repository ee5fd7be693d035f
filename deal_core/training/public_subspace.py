"""A few public directions of a model's embeddings: where sums of records may live.

A sum of outer products in many directions tells who is in it: a record lies in the span of the
records, and a stranger does not. In the strongest directions of *public* texts, far fewer than
there are records, that is no longer so, and most of what tells topics apart is left: (M68) of
docs/method.md. Each site makes them itself, from texts that were installed with the project or that
all sites have (``data.public_path``); no message chooses them.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deal_core.atomic_write import atomic_write
from deal_core.data import Example, texts_digest
from deal_core.models.fast.prompt_forest import QUARTER
from deal_core.models.interface import Encoded, LanguageModel, text_alone
from deal_core.training.evaluation import base_embeddings

HALFWAY = 0.25
"""Power of a variance by which a direction is halfway whitened."""
LONG = 0.9
"""Share of public texts that are at most as long as the unit of length."""


@dataclass(frozen=True)
class Subspace:
    """Public directions of embeddings; all tensors float64."""

    centre: Tensor
    """Mean of public texts, ``(size,)``."""
    directions: Tensor
    """``(size, number)``, orthogonal columns, the strongest first; the weaker, the longer (M68)."""
    radius: float
    """Unit of length; most coordinates of public texts are within it."""

    def project(self, vectors: Tensor) -> Tensor:
        """Return coordinates of embeddings, ``(texts, number)``, float32."""
        return ((vectors.double() - self.centre) @ self.scaled).float()

    @property
    def scaled(self) -> Tensor:
        """The directions, in units of length."""
        return self.directions / self.radius


def lifted(head: Tensor, centre: Tensor, scaled: Tensor) -> Tensor:
    """Return a head for whole embeddings, ``(labels, size + 1)``, that scores them as ``head``,
    ``(labels, number + 1)``, scores their coordinates in a subspace: its centre, and its directions
    in units of length, ``(size, number)``."""
    weights = head[:, :-1].double() @ scaled.T
    bias = head[:, -1].double() - weights @ centre
    return torch.cat([weights, bias[:, None]], dim=1).float()


def principal(vectors: Tensor, number: int, power: float = HALFWAY) -> Subspace:
    """Return the ``number`` strongest directions of ``vectors``, ``(texts, size)``, about their
    mean; 0: all of a unit vector, as it is. A direction points to where its largest entry is
    positive. Each is shorter by this ``power`` of its variance, so that weak ones count for more,
    and noise drowns them no sooner: (M68)."""
    x, size = vectors.double(), vectors.shape[1]
    if not number:
        nothing, identity = torch.zeros(size).double(), torch.eye(size).double()
        return Subspace(nothing, identity, 1.0)
    centre = x.mean(dim=0)
    found = torch.linalg.eigh((x - centre).T @ (x - centre))
    directions = found.eigenvectors.flip(1)[:, :number]
    strength = found.eigenvalues.flip(0)[:number]
    known = strength > RANK * strength[0]
    directions = directions * known  # beyond the rank of few texts rounding alone decides
    if power:
        directions = directions * (strength.clamp(min=0.0) / strength.mean() + FLOOR).pow(-power)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    coordinates = (x - centre) @ directions
    radius = max(float(coordinates.norm(dim=1).quantile(LONG)), SHORTEST)
    return Subspace(centre, directions, radius)


def power_of(layers: int) -> float:
    """Return the exponent of (M68). The last layer alone of an encoder of sentences was trained to
    be compared as it is; that of a router tells tasks apart best three quarters whitened
    (measured)."""
    return {1: 0.0, QUARTER: 0.375}.get(layers, HALFWAY)


FLOOR = 0.1
"""Of the mean variance: weaker directions are not lengthened further."""
RANK = 1e-6
"""Of the largest eigenvalue: smaller ones are of rounding."""
SHORTEST = 1e-6
"""Of a unit of length: of equal texts it would be 0."""


def public_subspace(
    model: LanguageModel,
    texts: tuple[str, ...],
    layers: int,
    number: int,
    labels: Sequence[str],
    folder: Path | None = None,
) -> Subspace:
    """Return so many public directions of a frozen model (0: all that an embedding of its last
    ``layers`` has, as they are), whatever adapters it holds. What it makes of the texts is read
    again from ``folder`` where an earlier process has left it there. ``labels``: of a task, where a
    prompt names some; none: texts are read without a prompt."""
    if not number:
        texts = texts[:1]
    path = None if folder is None else folder / f"{_key(model, texts, layers, labels)}.npy"
    vectors = stored(path, lambda: text_vectors(model, texts, layers, labels))
    return principal(vectors, number, power_of(layers))


def stored(path: Path | None, make: Callable[[], Tensor]) -> Tensor:
    """Return a tensor, from a file whose name says all that it depends on, where an earlier process
    has left it; otherwise it is made, and left there for the next. A file that is damaged, or
    cannot be written, costs time alone; without a path nothing is read or written."""
    if path is None:
        return make()
    with suppress(OSError, ValueError, EOFError):
        return torch.from_numpy(np.load(path, allow_pickle=False))
    made, buffer = make(), BytesIO()
    np.save(buffer, made.numpy(), allow_pickle=False)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(path, buffer.getvalue(), 0o600)
    return made


def text_vectors(
    model: LanguageModel, texts: Sequence[str], layers: int, labels: Sequence[str]
) -> Tensor:
    """Return the frozen model's unit vectors of public texts or names, ``(texts, size)``, float32;
    ``labels``: of a task, where a prompt names some."""
    return base_embeddings(model, _encoded(model, texts, labels), layers)


def _encoded(model: LanguageModel, texts: Sequence[str], labels: Sequence[str]) -> list[Encoded]:
    """Texts in the prompt of a task with these labels; without any, each alone."""
    examples = [Example(text, labels[0] if labels else "") for text in texts]
    encoded = model.encode(examples, labels)
    return encoded if labels else [text_alone(each) for each in encoded]


def _key(model: LanguageModel, texts: tuple[str, ...], layers: int, labels: Sequence[str]) -> str:
    encoded = _encoded(model, texts, labels)
    read = hashlib.sha256(repr([each.tokens for each in encoded]).encode()).hexdigest()
    settings = texts_digest(texts), read, layers, tuple(labels)  # a text may be cut, or prompted
    hashed = hashlib.sha256(repr(settings).encode())
    for name, weight in model.module.state_dict().items():
        if "lora_" not in name:
            data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
            hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            hashed.update(data.tobytes())
    return hashed.hexdigest()[:40]
