"""An update is in one sum: by its place in the run, its own name and the round's terms."""

from __future__ import annotations

import pytest

from deal_core.secure_sum.messages import UsedUpdate
from deal_core.secure_sum.site_state import UsedUpdates

ROUND, OTHER = b"r" * 32, b"s" * 32


def test_the_same_again_is_the_same():
    once = UsedUpdates().masking(ROUND, "learn 0 1", "update")
    assert once.masking(ROUND, "learn 0 1", "update") == once
    assert UsedUpdates.from_bytes(once.to_bytes()) == once
    assert UsedUpdates.from_bytes(UsedUpdates().to_bytes()) == UsedUpdates()


@pytest.mark.parametrize(
    ("context", "update"), [(OTHER, "update"), (ROUND, "another"), (OTHER, "another")]
)
def test_a_place_is_masked_once(context, update):
    """Neither for another round, nor with an update that differs by next to nothing."""
    once = UsedUpdates.from_bytes(UsedUpdates().masking(ROUND, "learn 0 1", "update").to_bytes())
    with pytest.raises(UsedUpdate, match="a second sum would tell the difference"):
        once.masking(context, "learn 0 1", update)
    assert once.masking(context, "learn 0 2", update).masked.keys() == {"learn 0 1", "learn 0 2"}
