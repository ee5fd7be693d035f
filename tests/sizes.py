"""Sizes of short runs, to be added to those of :func:`tests.conftest.experiment_with`."""

from __future__ import annotations

ENOUGH_TO_LEARN = ("data.max_train=32", "data.max_test=32")
"""So that what is learnt shows in the accuracy."""
QUIET = ("method.prototype.directions=0", "method.prototype.noise_multiplier=0")
"""Class sums of whole embeddings without noise: no public text is read."""
TWO_LAYERS = 'adapter.target_modules=["4.attention.self.value", "5.attention.self.value"]'
"""Of the default's twelve: where it does not matter how many are adapted."""
TINY = ("data.max_train=12", "data.max_test=6", "train.max_length=8", TWO_LAYERS)
"""A third of the time, where it matters only whether two runs are the same."""
