"""Masks from seeds of 32 bits, as Flower's SecAgg+ has them, give a client's update away."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from deal_core.secure_sum import keys as masks
from tests.deal_core.secure_sum.attack import LARGEST, TARGET, attacked, residual
from tests.deal_core.secure_sum.flower_late import (
    CLIPPING,
    MOST_EXAMPLES,
    NODES,
    QUANTIZED,
    client,
    late_vector,
)
from tests.deal_core.secure_sum.seed_search import (
    RING,
    WORDS,
    ShortSeeds,
    Target,
    compiled,
    seeds_that_fit,
    short_seed,
)

LATE = {"mask": [TARGET]}
"""The others reveal what the target shares with them: its own mask alone is left."""
EXAMPLES = 250
WINDOW = 1 << 20
"""Seeds that a fast test tries."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler 'cc': two to the power of 32 seeds are too many for Python")
    return compiled(compiler, tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def flower(monkeypatch):
    """Flower's late vector, the update in it, and the seed of its mask."""
    generator = np.random.default_rng(20)
    monkeypatch.setattr(client, "os", SimpleNamespace(urandom=generator.bytes))
    update = generator.normal(0, 0.01, (40, 5))
    held, secret = late_vector(NODES[TARGET], update, EXAMPLES)
    return Target(held, 0, QUANTIZED), update, short_seed(secret)


def ours(length: int = 200) -> tuple[Target, np.ndarray]:
    """The same of this protocol, and the true words."""
    round_ = attacked(LATE, length)
    words, left = residual(round_, TARGET)
    assert left == [1]
    own = round_.encoded[round_.terms.cohort[TARGET]].words
    return Target(words, -LARGEST, LARGEST), own.view("<i4")


@pytest.fixture
def ours_with_short_seeds(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(masks, "mask_stream", ShortSeeds)
        return ours()


def assert_is_update(numbers: np.ndarray, update: np.ndarray) -> None:
    """The examples are those of the client, and the update is its own but for Flower's rounding."""
    weight = numbers[0] / QUANTIZED
    assert round(weight * MOST_EXAMPLES) == EXAMPLES
    found = dequantize([numbers[1:]], CLIPPING, QUANTIZED)[0] / weight
    step = 2 * CLIPPING / QUANTIZED / weight
    assert np.abs(found - update.ravel()).max() <= step < np.abs(update).max() / 100


@pytest.mark.parametrize("seed", [0, 1, 12_345, 2_863_311_531, RING - 97, RING - 1])
def test_the_program_makes_the_words_of_the_generator(program, seed):
    words = pseudo_rand_gen(seed.to_bytes(4, "little"), RING, [(WORDS,)])[0]
    first = max(seed - 500, 0)
    exact = Target(words, 0, 0)
    shifted = [Target(words - (np.arange(WORDS) == at), 0, 0) for at in (0, 1, WORDS - 1)]
    found = seeds_that_fit(program, [exact, *shifted], first, min(1000, RING - first))
    assert found == [[seed], [], [], []]


def test_the_bounds_of_true_numbers_are_kept(program):
    seed = 77
    mask = pseudo_rand_gen(seed.to_bytes(4, "little"), RING, [(WORDS,)])[0]
    numbers = np.array([-3, 5, 0, -3, 5, 1, 2, 4])
    bounds = [(-3, 5), (-2, 5), (-3, 4), (-100, 100)]
    targets = [Target((mask + numbers) % RING, *each) for each in bounds]
    assert seeds_that_fit(program, targets, 0, 200) == [[seed], [], [], [seed]]
    assert targets[0].without(seed).tolist() == numbers.tolist()


def test_among_a_million_seeds_the_one_of_a_late_vector_of_flower_is_found(program, flower):
    target, update, seed = flower
    first = seed // WINDOW * WINDOW
    assert seeds_that_fit(program, [target], first, WINDOW) == [[seed]]
    assert_is_update(target.without(seed), update)
    assert seeds_that_fit(program, [target], first + WINDOW, WINDOW) == [[]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_all_seeds_the_attack_finds_that_of_a_mask_and_with_it_the_update(
    program, flower, ours_with_short_seeds
):
    """Nothing is known of an update but its public bounds. Streams of AES stay closed."""
    target, update, seed = flower
    weakened, own = ours_with_short_seeds
    found = seeds_that_fit(program, [target, weakened, ours()[0]])
    assert found[0] == [seed]
    assert_is_update(target.without(seed), update)
    (other,) = found[1]
    assert np.array_equal(weakened.without(other), own)
    assert found[2] == []
