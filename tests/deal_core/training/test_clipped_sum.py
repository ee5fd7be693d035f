"""What one gradient adds to a clipped sum is at most the bound, whatever the others are."""

import math

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.deal.objective import Plain
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import ClippedSum, clipped_gradients, clipping_bound
from deal_core.randomness import seeded

BITS = 30
LABELS = ("Anatomy", "Surgery", "Skin")


def total(gradients, most=1.0, bits=BITS):
    entries = sum(part.numel() for part in gradients[0].values())
    found = ClippedSum(clipping_bound(most, entries, bits), most / 2**bits)
    for gradient in gradients:
        found.add(gradient)
    return found


def length(change, most=1.0, bits=BITS):
    squares = sum(int((part.to(torch.int64) ** 2).sum()) for part in change.values())
    return math.sqrt(squares) * most / 2**bits


def difference(first, second):
    return {key: first.total[key] - second.total[key] for key in first.total}


@pytest.mark.parametrize("bits", [16, 30])
@pytest.mark.parametrize("most", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e30])
def test_one_gradient_adds_its_clipped_self_and_no_more(bits, most, size):
    generator = seeded("clipped sum", bits)
    drawn = [{"a": torch.randn(5, 7, generator=generator)} for _ in range(20)]
    drawn[3] = {"a": drawn[3]["a"] * size}
    whole, rest = total(drawn, most, bits), total(drawn[:3] + drawn[4:], most, bits)
    moved = length(difference(whole, rest), most, bits)
    assert moved <= most
    if float(drawn[3]["a"].norm()) >= most:
        assert moved > most * (1.0 - 2.0 ** (4 - bits))


def test_rounding_does_not_take_a_gradient_past_its_bound():
    """Float32 gradients within a few of the last digits of the bound, and long ones, of few entries
    and of many; whole numbers are compared."""
    for draw in range(100):
        values = torch.randn((1, 3, 50, 3000)[draw % 4], generator=seeded("near the bound", draw))
        wanted = (1.0 + (draw % 7 - 3) * 2.0**-24) * (1.0 if draw % 2 else 1e3)
        near = (values.double() * wanted / values.double().norm()).float()
        for bits in (16, 30):
            steps = total([{"a": near}], bits=bits).total["a"].tolist()
            assert sum(value**2 for value in steps) <= 4**bits


def test_among_sums_that_float32_would_round_one_still_adds_no_more():
    """Half of the others end near a power of two, where float32 rounds differently on both sides:
    there one gradient moves a sum in float32 by several bounds."""
    count, up, down = 1024, 0.51 * 2.0**-14, -0.49 * 2.0**-14
    others = [torch.full((1, 1), 0.999)] * count
    others += [torch.full((1, 1), value) for _ in range(count // 2) for value in (up, down)]
    ours = torch.full((1, 1), 0.6)
    gradients = [{"a": each} for each in others]
    moved = difference(total([{"a": ours}, *gradients]), total(gradients))
    assert length(moved) == pytest.approx(float(ours), abs=2.0**-BITS)
    floats = [torch.cumsum(torch.cat(parts).float().flatten(), 0)[-1] for parts in (
        [ours, *others], others)]  # fmt: skip
    assert abs(float(floats[0] - floats[1]) - 0.6) > 1e-5


def test_order_and_company_change_nothing():
    generator = seeded("company")
    drawn = [{"a": torch.randn(3, 3, generator=generator)} for _ in range(50)]
    forward, backward = total(drawn), total(drawn[::-1])
    assert torch.equal(forward.total["a"], backward.total["a"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_or_missing_adds_nothing(bad):
    good = {"a": torch.ones(2, 2)}
    found = total([good, {"a": torch.full((2, 2), bad)}, {}])
    assert torch.equal(found.total["a"], total([good]).total["a"])
    assert math.isnan(found.norms[2])


@pytest.fixture(scope="module")
def collapsed():
    """A model whose first adapter adds the same huge vector to every token, and whose second takes
    it away again: the text is in the last bits alone, where rounding is."""
    loaded = load_model(ModelConfig(), AdapterConfig(target_modules=["value"]), 32, torch.float32)
    before = read(loaded.module)
    generator = seeded("collapsed")
    layers = {}
    for number, (name, factors) in enumerate(before.layers.items()):
        A, B = torch.zeros_like(factors.A), torch.zeros_like(factors.B)
        if number == 0:
            weight = loaded.module.get_base_model().embeddings.LayerNorm.weight.detach()
            A[0] = 1 / weight
            B[:, 0] = 500 * torch.randn(len(B), generator=generator)
        if number > 0:
            A.copy_(0.05 * torch.randn(A.shape, generator=generator))
            B.copy_(500 * torch.randn(B.shape, generator=generator))
        layers[name] = LoraFactors(A, B)
    write(loaded.module, Adapter(layers, before.scaling))
    return loaded


def test_a_record_adds_the_same_whoever_else_is_drawn(collapsed):
    """In a pass with others its numbers would be rounded as the pass is laid out: by a crafted
    adapter that is what the gradient consists of."""
    set_trainable(collapsed.module, frozenset({"lora_B"}))
    words = ["ward", "fever at night", "pain", "no change since Monday", "a longer note of the day"]
    texts = [f"{words[n % 5]} {words[n % 3]} {n}" for n in range(12)]
    data = [Encoded(tuple(ids), n % 3) for n, ids in enumerate(collapsed.tokens(texts))]
    objective = Plain(collapsed, LABELS, data)
    step = 2.0**-BITS

    def of(examples):
        return clipped_gradients(collapsed.module, objective, examples, range(12), 0.9, step)

    whole = of(list(range(12)))
    for left_out in (0, 7):
        rest = of([n for n in range(12) if n != left_out])
        alone = of([left_out])
        for key, moved in difference(whole, rest).items():
            assert torch.equal(moved, alone.total[key])
