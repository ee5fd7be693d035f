"""All seeds of 32 bits of Flower's mask generator, tried against masked words.

Flower's SecAgg+ folds a secret of 32 bytes into a seed of 32 bits for numpy's MT19937, whose
outputs are the mask (``flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen``).
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

RING = 1 << 32
WORDS = 8
"""First words of a vector that are looked at."""


@dataclass(frozen=True)
class Target:
    """What is known of a vector: its masked words, and between what its true numbers lie."""

    masked: np.ndarray
    least: int
    most: int

    def line(self) -> str:
        """As the program reads it."""
        words = np.asarray(self.masked).ravel()[:WORDS].tolist()
        numbers = [self.least, self.most - self.least, *words]
        return " ".join(str(int(number) % RING) for number in numbers)

    def without(self, seed: int) -> np.ndarray:
        """The vector, if that is the seed of its mask."""
        mask = pseudo_rand_gen(seed.to_bytes(4, "little"), RING, [np.shape(self.masked)])[0]
        left = (np.asarray(self.masked).astype(np.int64) - mask - self.least) % RING
        return np.asarray(left + self.least)


def compiled(compiler: str, folder: Path) -> Path:
    """Return the program, for the processor at hand."""
    program = folder / "mt19937_seeds"
    source = Path(__file__).parent / "mt19937_seeds.c"
    flags = ("-O3", "-march=native", "-Wall", "-Wextra")
    subprocess.run([compiler, *flags, "-o", program, source], check=True)
    return program


def seeds_that_fit(
    program: Path, targets: Sequence[Target], first: int = 0, count: int = RING
) -> list[list[int]]:
    """Return for each target the seeds that leave numbers between its bounds."""
    said = "\n".join(target.line() for target in targets)
    ran = subprocess.run(
        [program, str(first), str(count)], input=said, capture_output=True, text=True, check=True
    )
    found: list[list[int]] = [[] for _ in targets]
    for line in ran.stdout.splitlines():
        at, seed = map(int, line.split())
        found[at].append(seed)
    return found


class ShortSeeds:
    """Flower's mask of a key, in the place of an AES stream; for vectors of one block."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def update_into(self, still: memoryview, buffer: bytearray) -> None:
        """Write the first words of the mask."""
        words = pseudo_rand_gen(self.key, RING, [(len(still) // 4,)])[0]
        memoryview(buffer)[: len(still)] = words.astype("<u4").tobytes()


def short_seed(key: bytes) -> int:
    """The seed that Flower makes of a key."""
    return int(np.bitwise_xor.reduce(np.frombuffer(key, "<u4")))
