"""Records are protected from each other's accidents: what one does to the arithmetic stays its own,
and changes a release by no more than the record may."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from client.runtime import ClientRuntime
from deal_core.data import Example
from deal_core.lora.adapter import Adapter, LoraFactors, zero_adapter
from deal_core.lora.attach import at_task_start
from deal_core.lora.state import State
from deal_core.privacy.interface import RehearsalFailed
from deal_core.training.loop import load_state
from deal_core.wire.instruction import Instruction
from tests.client.real_site import RealSite, asked
from tests.slow import slow_but

WORDS = ["a", "b", "c", "d"]
LONG = " ".join(["b"] * 31 + ["c"])
RANK = 2
FELL_BACK = "noise alone leaves"


def texts(number):
    return [" ".join(WORDS[(i >> k) & 3] for k in range(0, 12, 2)) for i in range(number)]


def gpt2(folder, positions, tiny):
    """A decoder that cannot read beyond so many positions, and ends its answers."""
    tiny(folder, "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Desk:
    """A site's runtime for one experiment, on a model and records of the test's own."""

    def __init__(self, folder, model, policy, rows, labels, *overrides):
        column = 'target_column = "label"\n' if not labels["laboratory"] else ""
        self.site = RealSite(
            folder,
            policy=f'mechanism = "record"\nmax_epsilon = 1.0\n{policy}',
            data={"laboratory": rows},
            declared=labels,
            data_lines=column,
        )
        path = folder / "site.toml"
        path.write_text(f'{path.read_text()}\n[models]\n"{model}" = ""\n')
        usual = ("model.family=causal-lm", f'model.name="{model}"', f"adapter.rank={RANK}")
        bounds = ("train.max_length=32", "privacy.target_epsilon=1", "federation.rounds=1")
        experiment = asked(*usual, *bounds, *overrides, labels=labels)
        self.client = self.site.client(experiment)
        self.runtime = ClientRuntime(self.client.experiment, whole=True)

    def update(self, state, ask):
        return self.site.update(self.client.asked, ask, state, runtime=self.runtime)

    def state(self, seed=None):
        """Adapters of zeros; with a ``seed`` what is retained is large, and drawn."""
        adapter = self.runtime.experiment.adapter
        shapes, scaling = self.runtime.shapes, adapter.lora_alpha / RANK
        current = zero_adapter(shapes, RANK, scaling)
        retained = zero_adapter(shapes, adapter.retained_rank)
        if seed is None:
            return State(current, retained)
        generator = torch.Generator().manual_seed(seed)
        layers = {
            name: LoraFactors(
                torch.randn(factors.A.shape, generator=generator),
                3.0 * torch.randn(factors.B.shape, generator=generator),
            )
            for name, factors in retained.layers.items()
        }
        return State(current, Adapter(layers))

    def state_that_writes_long(self, encoded):
        """A state under which the long record alone is answered beyond the model's positions."""
        longest = self.runtime.longest((), "")
        for seed in range(300):
            state = self.state(seed)
            load_state(self.runtime.model, state)
            with at_task_start(self.runtime.model.module):
                try:
                    self.runtime.model.written(longest)
                except IndexError:
                    continue
                try:
                    self.runtime.model.written(encoded)
                except IndexError:
                    return state
        raise AssertionError("no such state")


def instruction(**what):
    return Instruction(rank=RANK, retained_rank=8, **what)


THERE = pytest.mark.parametrize("there", slow_but([False, True], True))
"""Whether the record is among the others."""
LABELS = {"laboratory": ("red", "blue"), "surgery": ("green", "d"), "skin": ("a", "b")}


@pytest.mark.parametrize("instruction_words", [8, 2])
@THERE
def test_class_sums_of_a_record_that_does_not_fit(
    tmp_path, make_causal, caplog, there, instruction_words
):
    """Under a long instruction the longest text does not fit: that is found before a record is
    read. Under one that lets it fit the sums are real, with the record and without."""
    rows = [(text, ("red", "blue")[i % 2]) for i, text in enumerate(texts(400))]
    rows += [(LONG, "red")] * there
    words = "Answer with one of the options . " * instruction_words
    here = Desk(
        tmp_path / "site",
        gpt2(tmp_path / "gpt2", 90, make_causal),
        'noise_share = "sum"\nserver_vouches_for_peers = true\ncolluding = 0\n',
        rows,
        LABELS,
        *("method.name=prototype", "train.step=server"),
        *("method.prototype.layers=1", "method.prototype.directions=0", "aggregation.secure=true"),
        "privacy.noise_share=sum",
        *("privacy.colluding=0", "privacy.target_delta=1e-4", 'data.tasks=["laboratory"]'),
        'federation.sites=["north","south","east"]',
        f'data.instructions={{laboratory="{words}"}}',
    )
    ask = instruction(task="laboratory", stage=0, server_round=1, trained=("lora_B",))
    with caplog.at_level(logging.ERROR):
        if instruction_words == 8:
            with pytest.raises(RehearsalFailed):
                here.update(here.state(), ask)
            assert not here.site.events
            return
        update = here.update(here.state(), ask)
    assert FELL_BACK not in caplog.text
    counts = update.arrays["0.class_sums"][:, -1] / 2**16 / 0.25
    assert counts == pytest.approx([200, 200], abs=80)


@THERE
def test_a_teacher_that_cannot_answer_about_one_record(
    tmp_path, make_causal, caplog, monkeypatch, there
):
    """It has no gradient; the others have theirs. A site that tries out an answer as long as there
    may be refuses such a model before it reads a record."""
    rows = [(text, ("red", "blue")[i % 2]) for i, text in enumerate(texts(60))]
    rows += [(LONG, "red")] * there
    here = Desk(
        tmp_path / "site",
        gpt2(tmp_path / "gpt2", 56, make_causal),
        "",
        rows,
        {"laboratory": ("red", "blue"), "skin": ()},
        *("method.name=deal", "method.retention.filter=none", "model.max_new_tokens=12"),
        *('data.generation=["skin"]', 'data.tasks=["skin","laboratory"]'),
    )
    chosen = here.state_that_writes_long(
        here.runtime.model.encode([Example(LONG, "", target="x")], ())
    )
    ask = instruction(
        task="laboratory", stage=1, server_round=1, trained=("lora_B",), seen=("skin",)
    )
    with pytest.raises(RehearsalFailed):
        here.update(chosen, ask)
    assert not here.site.events
    monkeypatch.setattr(here.runtime, "rehearse_gradients", lambda *_: None)
    with caplog.at_level(logging.ERROR):
        here.update(chosen, ask)
    assert FELL_BACK not in caplog.text
    assert [event.steps > 0 for event in here.site.events] == [True]
