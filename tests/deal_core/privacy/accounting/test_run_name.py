"""The name of a run: a digest of all its settings."""

from __future__ import annotations

import re

from deal_core.config.run_config import run_name


def test_the_name_is_the_whole_digest_and_another_for_other_settings(make_experiment):
    names = {
        run_name(make_experiment(*changed))
        for changed in ((), ("run.seed=1",), ("train.learning_rate=0.02",), ("adapter.rank=4",))
    }
    assert len(names) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in names)
