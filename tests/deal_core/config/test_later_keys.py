"""What a record without a setting says of it."""

from __future__ import annotations

import hashlib
import json

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.config.later_keys import BEFORE, completed
from deal_core.config.run_config import WHERE, flatten
from deal_core.privacy.accounting.run_name import run_name


def experiment(*overrides: str) -> Experiment:
    return parse_experiment(apply_overrides({}, overrides), "here")


def test_a_record_without_the_key_did_what_was_done_before_it() -> None:
    record = {"method": {"name": "deal", "distillation": {"weight": 2.0}}, "data": {"max_train": 3}}
    found = completed(record)
    assert found["method"]["distillation"] == {"weight": 2.0, "ahead": 0.0}
    assert {key: flatten(parse_experiment(found, "it"))[key] for key in BEFORE} == dict(BEFORE)
    assert record["method"] == {"name": "deal", "distillation": {"weight": 2.0}}


def test_a_record_with_the_key_says_it_itself() -> None:
    record = {"method": {"distillation": {"ahead": 0.5}, "logit_adjustment": 1.0}}
    assert completed(record)["method"] == record["method"]


def test_a_ledger_finds_releases_from_before_the_key() -> None:
    """The name of a run that does what was done then is the one it had then."""
    off = experiment(*(f"{key}={str(value).lower()}" for key, value in BEFORE.items()))
    then = {k: v for k, v in flatten(off).items() if k not in BEFORE and k not in WHERE}
    name = hashlib.sha256(json.dumps(then, sort_keys=True).encode()).hexdigest()[:16]
    assert run_name(off) == name
    assert run_name(experiment()) != run_name(off)
    assert run_name(experiment("method.logit_adjustment=0.5")) != run_name(experiment())
    assert run_name(experiment("privacy.disjoint_tasks=true")) != run_name(experiment())


def test_a_value_where_a_table_belongs_is_left_to_the_parser() -> None:
    """Of a damaged file, one line is said, as of any other."""
    assert completed({"method": 3})["method"] == 3
