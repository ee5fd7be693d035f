import tomllib
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from deal_core.config.file import (
    EXPERIMENT,
    apply_overrides,
    flatten,
    from_run_config,
    parse_experiment,
    read_toml,
    to_run_config,
)
from deal_core.errors import UserError

ROOT = Path(__file__).parents[3]
BUNDLE = ROOT / "simulations/bundle"
RICH = {
    "description": 'a "quoted" line',
    "adapter": {"target_modules": ["query", "value"], "lora_alpha": 8},
    "data": {
        "source": "hub",
        "tasks": ["a", "b c"],
        "hub": {"a": {"path": "x/y", "label_text": {"0": "nein", "1": "ja"}}},
        "partition": {"kind": "iid"},
    },
    "method": {"update": {"lambda1": 0.5}},
}


@pytest.mark.parametrize("tables", [{}, RICH])
def test_the_run_config_is_text_and_reads_back(tables):
    experiment = parse_experiment(tables, "test")
    carried = to_run_config(experiment)
    assert {type(value) for value in carried.values()} == {str}
    assert from_run_config(carried) == experiment


@pytest.mark.parametrize("text", ["{", "[1]", '{"no": {"such": 1}}'])
def test_a_run_config_that_is_no_experiment_is_one_line(text):
    with pytest.raises(UserError, match="run config"):
        from_run_config({EXPERIMENT: text})


def test_lists_and_tables_are_json_text():
    flat = flatten(parse_experiment(RICH, "test"))
    assert flat["adapter.target_modules"] == '["query", "value"]'
    assert flat["data.tasks"] == '["a", "b c"]'
    assert flat["method.update.lambda1"] == 0.5
    assert flat["adapter.lora_alpha"] == 8.0


def test_the_bundle_declares_what_the_run_config_has():
    app = tomllib.loads((BUNDLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert set(app["config"]) == set(to_run_config(Experiment()))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"adaptor": {}}, r"file: unknown key 'adaptor'; did you mean 'adapter'\?"),
        ({"adapter": {"rnk": 4}}, r"unknown key 'adapter.rnk'; did you mean 'rank'\?"),
        (
            {"method": {"distillation": {"wieght": 1.0}}},
            r"'method.distillation.wieght'; did you mean 'weight'\?",
        ),
        ({"adapter": {"zzz": 4}}, r"unknown key 'adapter.zzz'$"),
        (
            {"data": {"hub": {"a": {"path": "x", "lable_column": "y"}}}},
            r"'data.hub.a.lable_column'; did you mean 'label_column'\?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(tables, message):
    with pytest.raises(UserError, match=message):
        parse_experiment(tables, "file")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"adapter": {"rank": "8"}}, r"key 'adapter.rank' should be integer, but is \"8\""),
        ({"adapter": {"rank": 8.5}}, r"key 'adapter.rank' should be integer, but is 8.5"),
        ({"adapter": {"rank": True}}, r"key 'adapter.rank' should be integer, but is true"),
        ({"adapter": {"rank": 0}}, r"'adapter.rank' should be greater than or equal to 1"),
        ({"adapter": 8}, r"key 'adapter' should be .*but is 8"),
        ({"data": {"tasks": "surgery"}}, r"key 'data.tasks' should be .*but is \"surgery\""),
        ({"run": {"resume": "yes"}}, r"key 'run.resume' should be boolean, but is \"yes\""),
        ({"privacy": {"target_delta": 1e-11}}, r"privacy.target_delta: should be 0, or at least"),
        ({"train": {"precision": "half"}}, r"key 'train.precision' should be 'auto', 'float32'"),
    ],
)
def test_a_wrong_type_or_value_names_the_key(tables, message):
    with pytest.raises(UserError, match=message) as error:
        parse_experiment(tables, "file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys", [{"consolidate_every": 2}, {"orders": {"0": ["eye"]}}])
@pytest.mark.parametrize("schedule", ["synchronous", "joint"])
def test_an_order_of_their_own_without_its_schedule_is_named(schedule, keys):
    with pytest.raises(UserError, match=r"file: stream: .* schedule = \"per-client\" alone"):
        parse_experiment({"stream": {"schedule": schedule, **keys}}, "file")
    parse_experiment({"stream": {"schedule": "per-client", **keys}}, "file")


def test_the_experiment_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Experiment().run.seed = 1


def test_override_values_are_toml_and_a_bare_word_is_a_string():
    before = {"adapter": {"rank": 8}}
    overrides = ["adapter.rank=4", "model.name=embedded:minilm", 'data.tasks=["a"]']
    after = apply_overrides(before, [*overrides, "run.resume = true", "model.name=a=b"])
    assert after == {
        "adapter": {"rank": 4},
        "model": {"name": "a=b"},
        "data": {"tasks": ["a"]},
        "run": {"resume": True},
    }
    assert before == {"adapter": {"rank": 8}}


@pytest.mark.parametrize("override", ["adapter.rank", "=4", "adapter.rank.x=1"])
def test_a_bad_override_is_quoted(override):
    with pytest.raises(UserError, match=f"--set {override}: "):
        apply_overrides({"adapter": {"rank": 8}}, [override])


@pytest.mark.parametrize("text", ["3\nx = 4", "3\n[table]", "[" * 5000, "1" * 5000])
def test_a_value_that_is_not_one_value_of_toml_is_a_text(text):
    assert apply_overrides({}, [f"data.path={text}"]) == {"data": {"path": text}}


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "1" * 5000])
def test_a_file_beyond_what_can_be_read_is_named(tmp_path, text):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.toml: cannot be read"):
        read_toml(path)


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "x.toml"
    with pytest.raises(UserError, match=r"x.toml: no such file"):
        read_toml(path)
    path.write_text("a = 1\nb = \n")
    with pytest.raises(UserError, match=r"x.toml: not valid TOML .*line 2"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"x.toml: cannot be read"):
        read_toml(path)
    with pytest.raises(UserError, match=r"cannot be read"):
        read_toml(tmp_path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "simulations" / "experiments").rglob("*.toml")), ids=lambda p: p.stem
)
def test_every_shipped_experiment_parses(path):
    assert parse_experiment(read_toml(path), path.name).description


def test_a_date_is_no_setting():
    with pytest.raises(UserError, match="use strings, numbers, booleans and lists"):
        parse_experiment(tomllib.loads("[run]\nseed = 2020-01-01"), "file")


def test_sites_are_the_clients():
    parse_experiment({"federation": {"sites": ["a", "b", "c"]}}, "test")
    for table, reason in (
        ({"sites": ["a", "b"], "clients": 3}, "sites names 2, but clients is 3"),
        ({"sites": ["a", "a"]}, "sites names a site twice"),
    ):
        with pytest.raises(UserError, match=reason):
            parse_experiment({"federation": table}, "test")


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("key", ["train.learning_rate", "method.update.lambda1"])
def test_a_number_is_finite(key, value):
    """JSON has no other: results could not be read back."""
    with pytest.raises(UserError, match=key) as error:
        parse_experiment(apply_overrides({}, [f"{key}={value}"]), "--set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["animal", "animal", "vehicle"], "the label 'animal' twice"),
        (["animal", ""], "an empty label"),
        (["animal", "vehicle "], "the label 'vehicle ' with blanks around it"),
    ],
)
def test_labels_of_a_task_can_be_told_apart(labels, problem):
    with pytest.raises(UserError, match=r"data\.labels") as error:
        parse_experiment({"data": {"labels": {"t": labels}}}, "my.toml")
    assert problem in str(error.value)
