"""Names that another installed package adds: found as any package's entry points are."""

import sys

import pytest

from deal_core.aggregation.rules import make_rule
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.models import family_of
from simulations.api import run
from tests.simulations.runs import assert_same_run
from tests.sizes import TINY

PACKAGE = """
from deal_core.aggregation.rules import AGGREGATION_RULES
from deal_core.data import SOURCES
from deal_core.methods import METHODS
from deal_core.models import FAMILIES

made = []
method = lambda *given: made.append("method") or METHODS["sequential"](*given)
source = lambda *given: made.append("source") or SOURCES["embedded"](*given)
rule, family = AGGREGATION_RULES["ffa"], FAMILIES["encoder-labels"]
"""
GROUPS = {
    "methods": ("method.name", "method", method_of),
    "aggregators": ("aggregation.rule", "rule", lambda asked: make_rule(asked.aggregation)),
    "models": ("model.family", "family", lambda asked: family_of(asked.model)),
    "sources": ("data.source", "source", lambda asked: open_source(asked.data)),
}
"""Group of entry points to the key that names one, the package's object, and who asks for it."""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    told = site / "mine_of_tests-1.dist-info"
    told.mkdir(parents=True)
    (site / "mine_of_tests.py").write_text(PACKAGE)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-of-tests\nVersion: 1\n")
    lines = [f"[federated_deal.{g}]\nmine = mine_of_tests:{own[1]}\n" for g, own in GROUPS.items()]
    (told / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "mine_of_tests", raising=False)


@pytest.mark.parametrize("group", GROUPS)
def test_a_package_adds_a_name(group, installed, make_experiment):
    key, kind, find = GROUPS[group]
    with pytest.raises(UserError, match=r"unknown .* 'mint'"):
        find(make_experiment(f"{key}=mint"))
    found = find(make_experiment(f"{key}=mine"))
    import mine_of_tests

    made = kind in mine_of_tests.made
    assert made or found is getattr(mine_of_tests, kind)


@pytest.mark.filterwarnings("ignore:task")  # those of tests are small
def test_a_whole_run_knows_them(installed, make_experiment, tmp_path):
    """It learns what it learns under the names of the same objects here."""
    base = ("federation.rounds=1", "aggregation.rule=ffa", "method.name=sequential", *TINY)
    names = [f"{key}=mine" for key, *_ in GROUPS.values()]
    own, plain = (
        run(make_experiment(*base, *more), out=tmp_path / f"run-{len(more)}")
        for more in (names, ())
    )
    assert own.results.config.method.name == "mine"
    assert_same_run(own.folder, plain.folder)
