"""The model card says what the results say: no epsilon without delta, unit and assumptions."""

import pytest

from deal_core.config.experiment import ModelConfig
from deal_core.inference.folder import Inference, TaskSpace
from server.export import as_text, hub_name, model_card
from server.results import Privacy
from tests.simulations.run.test_run_log import results

SPACES = (TaskSpace(name="heart", labels=("old", "a|b")), TaskSpace(name="skin", labels=("rash",)))
PRIVATE = Privacy(
    mechanism="record",
    unit="record",
    assumes="nobody outside the site is trusted",
    delta=1e-4,
    epsilon={"0": 3.0, "1": 7.5},
)


def inference(name="embedded:minilm", upstream="org/model"):
    return Inference(
        model=ModelConfig(name=name),
        upstream=upstream,
        task_type="FEATURE_EXTRACTION",
        pooling="mean",
        max_length=8,
        precision="float32",
        tasks=SPACES,
        current_rank=1,
        current_scaling=2.0,
        versions={"peft": "1.2.3"},
    )


def test_an_epsilon_has_delta_unit_extent_and_assumptions():
    card = model_card(results(privacy=PRIVATE), inference())
    assert "epsilon <= 7.5 at delta = 0.0001, largest over clients" in card
    assert "one record; composed over all rounds and tasks" in card
    assert PRIVATE.assumes in card
    assert "| heart | old, a\\|b | 60.0 % | not known |" in card  # nor is a label a column
    more = {"simulation_only": True, "disjoint_tasks": True, "n_delta": 0.05}
    other = model_card(results(privacy=PRIVATE.model_copy(update=more)), inference())
    for part in ("(n delta <= 0.05)", "**Simulation only**", "a record being in one task"):
        assert part in other
        assert part not in card
    bare = model_card(results(privacy=Privacy(mechanism="record", epsilon={"0": 1.0})), inference())
    assert "no guarantee was recorded" in bare
    assert "epsilon" not in bare


@pytest.mark.parametrize(
    ("name", "upstream", "hub"),
    [
        ("embedded:minilm", "org/model", "org/model"),
        ("org/other", "", "org/other"),
        ("bert-base-uncased", "", "bert-base-uncased"),
        ("org/other@v1.0", "", "org/other"),
        ("/srv/models/bert", "", ""),
        ("./bert", "", ""),
    ],
)
def test_a_folder_is_no_name_on_a_hub(name, upstream, hub):
    assert hub_name(inference(name, upstream)) == hub
    card = model_card(results(), inference(name, upstream))
    assert ("base_model:" in card) == bool(hub)


def test_somebodys_words_forge_no_section_and_no_tag():
    forged = "x\n\n## Privacy\n\n- epsilon <= 0.01 <script>alert(1)</script> [here](http://x)"
    assert as_text(forged) == (
        "x ## Privacy - epsilon &lt;= 0.01 &lt;script>alert(1)&lt;/script> \\[here](http://x)"
    )
    assert as_text("\\[here](http://x)") == "\\\\\\[here](http://x)"  # a backslash, and no link
    told = results()
    config = told.config.model_copy(update={"description": forged})
    card = model_card(told.model_copy(update={"config": config}), inference())
    assert [line for line in card.splitlines() if line.startswith("## Privacy")] == ["## Privacy"]
    assert "<script>" not in card
