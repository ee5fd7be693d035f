"""Every benchmark in its smallest size, its contestants in this process."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import aggregation
import measuring
import private
import rounds
import scoring
import secure
import step
from deal_core.aggregation.rules import AGGREGATION_RULES

Rows = list[dict[str, Any]]


class Here:
    """Stands in for a process of its own."""

    def __init__(self, *_):
        self.window = dict

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def submit(self, function, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process
        if function is measuring._start:
            (contestant,) = arguments
            self.window = contestant.make(*contestant.arguments)
        found = self.window() if function is measuring._window else measuring.peak()
        return SimpleNamespace(result=lambda: found)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Run a benchmark in its smallest size; returns the rows of each table that it writes."""
    monkeypatch.setattr(measuring, "ProcessPoolExecutor", Here)

    def call(main, *arguments):
        out = tmp_path / "new" / "out.json"
        main(["--size", "small", "--out", str(out)], *arguments)
        written = json.loads(out.read_text())
        assert written["machine"]["cores"]
        return list(written["tables"].values())

    return call


@pytest.fixture(scope="module")
def tiny(make_causal, tmp_path_factory):
    return str(make_causal(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.mark.filterwarnings("ignore")  # of the Trainer
def test_the_step(tables, tiny):
    encoder, causal = tables(step.main, tiny)
    assert {row["contestant"].split(",")[0] for row in encoder} == {"Trainer", "deal"}
    assert [row["contestant"].split(",")[0] for row in causal] == ["Trainer", "deal", "deal"]
    assert all(row["ratio"] > 0 for row in encoder + causal)


def test_both_read_the_same_tokens(tiny):
    case = step.Case(tiny, 12, 2, 3, 5)
    examples, labels = step.questions(case)
    model = step.fresh_model(case, step.torch.float32)
    ours = model.encode(examples, labels)
    tokenizer = step.transformers.AutoTokenizer.from_pretrained(tiny)
    theirs = step.prompts(case, tokenizer, examples, labels)
    assert [list(item.tokens) for item in ours] == [prompt for prompt, _ in theirs]
    _, rows, collate = step.causal_parts(case, step.torch.float32)
    batch = collate(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(p) + len(a) for p, a in theirs]
    assert (batch["labels"] >= 0).sum(1).tolist() == [len(answer) for _, answer in theirs]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Opacus' own
def test_the_private_step(tables):
    (rows,) = tables(private.main)
    assert [row["contestant"] for row in rows] == ["plain", "record", "Opacus, both factors"]
    assert all(row["per second"] > 0 for row in rows)


def test_scores_are_those_of_the_plain_model(tables, tiny):
    (rows,) = tables(scoring.main, tiny)
    plain, ours = (row["score"] for row in rows)
    assert ours == pytest.approx(plain, rel=1e-2)
    assert len(set(scoring.LABELS)) >= 77


def test_exact_rules_are_exact_and_the_baseline_is_not(tables):
    (rows,) = tables(aggregation.main)
    assert [row["rule"] for row in rows] == list(AGGREGATION_RULES)
    for row in rows:
        assert row["error"] > 0.05 if row["rule"] == "fedit" else row["error"] < 1e-6
    sent = {row["rule"]: row["MB sent"] for row in rows}
    assert sent["ffa"] * 2 == sent["fedit"]


def test_the_secure_sum_is_exact_and_sends_little_more(tables):
    ((row,),) = tables(secure.main)
    assert row["exact"]
    assert 1 < row["up, times plain"] < 1 + (283 + 48 * 3 + 32 * 4) / secure.UPDATE_BYTES
    assert row["round, s"] > row["server, s"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:task 'surgery'")  # of few rows
def test_rounds_and_runs(tables):
    (rows,) = tables(rounds.main)
    assert [row["contestant"] for row in rows] == ["float32", "auto"]
    assert all(0 < row["besides"] < 1 for row in rows)
    assert len(rounds.on_inprocess(3)) == 4
