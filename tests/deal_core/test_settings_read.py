"""A method reads its own settings and no other method's, as ``READ_BY`` says."""

import pytest

from deal_core.config.experiment import READ_BY, AdapterConfig, MethodConfig
from deal_core.deal.interface import phases_of
from deal_core.methods import METHODS, make_method

asked = set()


class Watched(MethodConfig):
    """Settings that note which tables are asked for."""

    def __getattribute__(self, key):
        asked.add(key)
        return super().__getattribute__(key)


@pytest.mark.parametrize("method", METHODS)
def test_who_reads_a_table(method):
    config = Watched(name=method)
    asked.clear()
    phases_of(make_method(config, AdapterConfig()))
    assert asked & READ_BY.keys() == {table for table, names in READ_BY.items() if method in names}
