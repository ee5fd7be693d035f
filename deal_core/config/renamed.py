"""Keys that have another name since this version."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "method.fresh_adapter": "method.orthogonal_init",
        "method.distillation.ahead": "method.distillation.future_weight",
        "method.distillation.spaces": "method.distillation.softmax",
        "train.tokens_per_pass": "train.tokens_per_microbatch",
        "privacy.counts_noise": "privacy.metrics_noise",
        "policy.counts": "policy.share_num_examples",
    }
)
"""Old to new, of experiments and of ``site.toml``."""
