"""Baseline ``prototype``: class means of the frozen model's embeddings, and nothing trained.

Every client sends the sums of its records of a task once, with noise; the server adds them up. The
nearest class mean in the metric of public texts is the answer: (M69) of docs/method.md. Sources:
Mensink et al. 2013 (nearest class mean); Janson et al. 2022 (in continual learning).
"""

from __future__ import annotations

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.methods.shared.frozen import Frozen, statistics_phase
from deal_core.methods.shared.prototypes import class_statistics
from deal_core.wire.instruction import LEARN


def make_prototype(method: MethodConfig, adapter: AdapterConfig) -> Frozen:
    """Build from the experiment."""
    return Frozen(adapter, (statistics_phase(LEARN, 0, class_statistics(method.prototype)),))
