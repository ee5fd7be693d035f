"""The gradient of a record is the same to the bit whoever else is in a pass, and whatever becomes
of them."""

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import example_gradient, read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy import record_gradients as tested
from deal_core.privacy.record_gradients import WIDTHS, record_gradients, widths_apart
from deal_core.randomness import seeded
from deal_core.training.hardware import threads
from tests.deal_core.privacy.steps import LABELS
from tests.sizes import ENCODER

LENGTHS = (5, 16, 9, 30, 3, 12, 45, 17, 7, 11, 8, 14, 33, 6)
"""Of records: rows of 10 are 16 tokens wide, of 2 32, of 2 48; and of a last one."""
ALL = range(len(LENGTHS) + 1)
BOTH = frozenset({"lora_A", "lora_B"})


@pytest.fixture
def load(random_adapter):
    """A new model with something in both factors, which learn."""

    def made(name=str(ENCODER), family="encoder-labels", dtype=torch.float32):
        model = load_model(ModelConfig(family=family, name=name), AdapterConfig(), 64, dtype)
        write(model.module, random_adapter(read(model.module).shapes, 8, 0.05, seed=5))
        set_trainable(model.module, BOTH)
        return model

    return made


def records(model, last=60):
    draw = seeded("records")
    texts = [
        (1, *torch.randint(5, 20, (n - 1,), generator=draw).tolist()) for n in (*LENGTHS, last)
    ]
    return Plain(model, LABELS, [Encoded(text, n % 3) for n, text in enumerate(texts)])


@pytest.fixture
def passes(monkeypatch):
    """How many rows each pass has."""
    counts, original = [], tested.one_pass

    def counted(module, width, rows):
        counts.append(len(rows))
        return original(module, width, rows)

    monkeypatch.setattr(tested, "one_pass", counted)
    return counts


def found(model, objective, examples=ALL):
    return dict(zip(examples, record_gradients(model.module, objective, examples), strict=True))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def error(first, second):
    whole, own = (torch.cat([each[k].flatten() for k in second]) for each in (first, second))
    return float((whole - own).norm() / own.norm())


@pytest.mark.parametrize("kind", ["encoder", "minilm", "llama"])
def test_company_and_places_change_no_bit(kind, load, make_causal, tmp_path, passes):
    if kind == "llama":
        model = load(str(make_causal(tmp_path, kind)), "causal-lm")
    else:
        model = load() if kind == "encoder" else load(ModelConfig().name)
    objective = records(model, 70 if kind == "minilm" else 60)
    if kind != "llama":
        assert list(widths_apart(model.module)) == list(WIDTHS)
    passes.clear()
    everybody = found(model, objective)
    expected = {"encoder": [2, 2, 2, 2, 8], "minilm": [2, 2, 2, 8], "llama": []}
    assert sorted(passes) == expected[kind]
    alone = {example: example_gradient(model.module, objective, example) for example in ALL}
    assert all(error(everybody[example], alone[example]) < 1e-4 for example in ALL)
    sums = (
        {k: sum(own[k] for own in each.values()) for k in alone[0]} for each in (everybody, alone)
    )
    # AVX-512 kernels of attention round an exponential to 20 bits, otherwise at each width.
    assert error(*sums) < 1e-4
    draw = seeded("company")
    for size in (1, 2, 3, 5, 7, 9, 14, 15):
        some = torch.randperm(len(ALL), generator=draw)[:size].tolist()
        for example, gradient in found(model, objective, some).items():
            assert same(gradient, everybody[example])


@pytest.mark.parametrize("kind", ["encoder", "minilm", "llama"])
def test_in_bfloat16_each_record_goes_alone(kind, load, make_causal, tmp_path, passes):
    """Tile units sum a row of a pass otherwise in each size of pass; what others are asked for, and
    when, changes no bit of a pass of one's own."""
    names = {"encoder": str(ENCODER), "minilm": ModelConfig().name}
    name = names.get(kind) or str(make_causal(tmp_path, kind))
    model = load(name, "causal-lm" if kind == "llama" else "encoder-labels", torch.bfloat16)
    objective = records(model)
    everybody = found(model, objective)
    assert not passes
    for example in ALL:
        assert same(example_gradient(model.module, objective, example), everybody[example])
    draw = seeded("company")
    for size in (1, 3, 7, 15):
        some = torch.randperm(len(ALL), generator=draw)[:size].tolist()
        for example, gradient in found(model, objective, some).items():
            assert same(gradient, everybody[example])


def test_with_many_threads_each_record_goes_alone(load, passes):
    """Parts of a tensor then end within a vector, whose rest torch rounds otherwise for silu."""
    model = load()
    objective = records(model)
    with threads(3):
        assert not widths_apart(model.module)
        gradients = found(model, objective, range(3))
        alone = [example_gradient(model.module, objective, example) for example in range(3)]
    assert not passes
    assert all(map(same, gradients.values(), alone))


@pytest.mark.parametrize("fault", ["nan", "raises", "states", "pass"])
def test_a_record_that_fails_changes_no_bit_of_another(fault, load, monkeypatch):
    """In its loss; in the numbers that its row has; by ending the pass that it is in."""
    model, bad = load(), 2
    objective = records(model)
    before = found(model, objective)
    original = objective.example_losses
    if fault in ("nan", "raises"):

        def losses(self, batch):
            if fault == "raises" and bad in batch:
                raise RuntimeError("a record that cannot be read")
            return original(batch) * (torch.nan if bad in batch else 1.0)

        monkeypatch.setattr(Plain, "example_losses", losses)
    else:
        number = 40 if fault == "states" else 10**6
        tokens = (*objective.data[bad].tokens[:-1], number)
        objective.data[bad] = Encoded(tokens, objective.data[bad].target)
        model.module.get_input_embeddings().weight.data[40] = torch.inf
    after = found(model, objective)
    finite = all(bool(each.isfinite().all()) for each in after[bad].values())
    assert after.pop(bad) == {} or not finite
    assert len(after) == len(ALL) - 1
    assert all(same(gradient, before[example]) for example, gradient in after.items())


def mixed(layer, given, out):
    return out + 1e-6 * out.mean(dim=0, keepdim=True)


def mixed_where_it_is_no_number(layer, given, out):
    return out + 0 * out.sum()


def mixed_by_a_decision(layer, given, out):
    return out * 2 if bool((out.sum() > 1e9).item()) else out


def strange_to_padding(layer, given, out):
    return out * out.shape[1]


MIXING = [mixed, mixed_where_it_is_no_number, mixed_by_a_decision, strange_to_padding]


@pytest.mark.parametrize("hook", MIXING, ids=lambda hook: hook.__name__)
def test_where_rows_are_mixed_each_record_has_a_pass_of_its_own(hook, load):
    model = load()
    model.module.get_base_model().embeddings.register_forward_hook(hook)
    objective = records(model)
    assert list(widths_apart(model.module)) == []
    for example, gradient in found(model, objective).items():
        assert same(gradient, example_gradient(model.module, objective, example))


def test_trying_out_leaves_the_model_as_it_was(load):
    model = load()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    widths_apart(model.module)
    after = model.module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(factor.grad is None for factor in model.module.parameters())


def test_what_waits_is_bounded_and_changes_no_bit(load, monkeypatch):
    model = load()
    objective = records(model)
    everybody = found(model, objective)
    monkeypatch.setattr(tested, "WAITING", 1)
    assert all(same(own, everybody[n]) for n, own in found(model, objective).items())


def test_the_first_question_about_one_text_alone_is_answered_from_the_pass(load, monkeypatch):
    """One without a gradient, or of more than a text and its mask, goes to the model."""
    monkeypatch.setattr(tested, "widths_apart", lambda module: WIDTHS)
    module, asked = load().module, []
    ids = torch.tensor([[1, 5, 6]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tested._answering(module, lambda ids, width: asked.append(width)):
        with torch.no_grad():
            module(**text)
        module(**text, token_type_ids=torch.zeros_like(ids))
        assert asked == []
        for _ in range(2):
            module(**text)
    assert asked == [WIDTHS[0]]
