"""The benchmarks of language models, on a random one of a few thousand weights, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from deal_core.config.experiment import AdapterConfig, ModelConfig
from simulations import cli
from simulations.bench import scoring, step_causal
from simulations.bench.causal_deal import causal_deal_work, new_model
from simulations.bench.causal_trainer import causal_trainer_work, collate, row
from simulations.bench.limit import causal_operations
from simulations.bench.paired import Contestant, Timed
from simulations.bench.prompts import prompted, questions
from simulations.bench.scoring import Case
from simulations.bench.scoring_works import deal_scoring, label_names, plain_scoring
from simulations.bench.workloads import Workload

SMALL = Workload(12, 2, 4)
PRECISION = "float32"


@pytest.fixture(scope="module")
def tiny(make_causal: Callable[[Path, str], Path], tmp_path_factory) -> str:
    return str(make_causal(tmp_path_factory.mktemp("tiny"), "llama"))


def in_this_process(
    contestants: Sequence[Contestant], windows: int, warm_up: int = 1
) -> dict[str, Timed]:
    """Stand in for ``timed_in_turn``."""
    done = {}
    for number, each in enumerate(contestants, start=1):
        work = each.make(*each.arguments)
        figures = [{"seconds": 1.0, **work.window()} for _ in range(warm_up + windows)]
        kept = tuple({**figure, "seconds": float(number)} for figure in figures[warm_up:])
        done[each.name] = Timed(each.name, kept, number * 1000, work.report())
    return done


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step_causal, scoring):
        monkeypatch.setattr(module, "timed_in_turn", in_this_process)
        monkeypatch.setattr(module, "default_precision", lambda: PRECISION)


@pytest.mark.parametrize("options", [0, 14])
def test_both_read_the_same_tokens(tiny: str, options: int) -> None:
    asked = questions(3, SMALL.tokens, options)
    assert len(asked.labels) == (options or 3)
    assert {example.label for example in asked.train} <= set(asked.labels)
    model = new_model(tiny, AdapterConfig(), SMALL.tokens, torch.float32)
    ours = model.encode(asked.train, asked.labels)
    config, tokenizer = ModelConfig(name=tiny), AutoTokenizer.from_pretrained(tiny)
    theirs = prompted(tokenizer, config, asked.train, asked.labels, SMALL.tokens)
    assert [item.tokens for item in ours] == [item.prompt for item in theirs]
    assert {len(item.text) for item in ours} == {SMALL.tokens}
    assert ours[0].shared > 0


def test_both_learn_from_the_same_loss(tiny: str) -> None:
    works = [
        causal_trainer_work(SMALL, PRECISION, tiny),
        causal_deal_work(SMALL, PRECISION, tiny),
        causal_deal_work(SMALL, PRECISION, tiny, 0, shared=False),
        causal_deal_work(SMALL, PRECISION, tiny, 1),
    ]
    before = [work.report()["loss"] for work in works]
    assert before == pytest.approx([before[0]] * 4, rel=1e-5)
    for work in works:
        assert work.window()["work"] == SMALL.examples
        work.window()
    for work, start in zip(works, before, strict=True):
        assert work.report()["loss"] < start


def test_only_answers_have_a_loss_and_padding_has_none(tiny: str) -> None:
    asked, tokenizer = questions(1, 4), AutoTokenizer.from_pretrained(tiny)
    short, long = (
        prompted(tokenizer, ModelConfig(), asked.train, asked.labels, tokens)[0]
        for tokens in (2, 4)
    )
    batch = collate([row(short), row(long)])
    lengths = [len(item.prompt) + len(item.answer) for item in (short, long)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    answers = [len(item.answer) for item in (short, long)]
    assert (batch["labels"] >= 0).sum(1).tolist() == answers


def test_operations_are_those_of_a_forward_and_of_a_backward_pass(tiny: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    products = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    products -= model.get_input_embeddings().weight.numel()
    tokens = 64
    found = causal_operations(tiny, tokens)
    assert 4 * products * tokens * 0.9 < found
    assert found < 6 * products * tokens + 2 * causal_operations(tiny, tokens // 2)


def test_the_step_bench_compares_all_with_the_trainer(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    console = Console(width=160, record=True)
    step_causal.bench((SMALL,), console, str(path), tiny)
    written = json.loads(path.read_text())
    assert written["precision"] == PRECISION
    rows = {each["contestant"]: each for each in written["rows"]}
    assert len(rows) == 5
    printed = console.export_text()
    for number, (name, each) in enumerate(rows.items(), start=2):  # after the matrix products
        assert name in printed
        rate = SMALL.examples / number
        assert each["examples_per_second"] == pytest.approx([rate] * 3)
        assert each["examples_per_core_second"] == pytest.approx(rate / each["threads"])
        assert each["ratio"] == pytest.approx([2 / number] * 3)
        assert each["peak_ratio"] == number / 2
        assert each["limit_share"] > 0


def test_all_score_alike(tiny: str) -> None:
    case = (5, 8, 2, PRECISION, tiny)
    ours = deal_scoring(*case)
    for batched in (False, True):
        plain = plain_scoring(*case, batched)
        assert plain.window() == {"work": 2}
        assert plain.scores.shape == (2, 5)
        torch.testing.assert_close(plain.scores, ours.scores, rtol=1e-4, atol=1e-5)
        assert plain.report()["score"] == pytest.approx(ours.report()["score"], rel=1e-4)


def test_there_are_seventy_seven_labels() -> None:
    assert len(set(label_names(77))) == 77
    assert label_names(14) == label_names(77)[:14]
    assert {case.labels for case in scoring.CASES} == {14, 77}


def test_the_scoring_bench_compares_all_with_the_plain_model(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    console = Console(width=160, record=True)
    scoring.bench((Case(3, 8, 2),), console, str(path), tiny)
    alone, together, ours = json.loads(path.read_text())["rows"]
    assert alone["ratio"] == [1, 1, 1]
    assert together["ratio"] == [0.5, 0.5, 0.5]
    assert ours["ratio"] == pytest.approx([2 / 3] * 3)  # twice the texts in three times the time
    assert alone["score"] == pytest.approx(ours["score"], rel=1e-4)
    assert ours["contestant"] in console.export_text()


def test_an_unknown_family_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["deal", "bench", "step", "--family", "rnn"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "unknown --family 'rnn'; known: causal-lm, encoder-labels" in capsys.readouterr().err
