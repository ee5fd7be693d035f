"""The dense change of a base weight: what rules are compared with."""

from __future__ import annotations

from torch import Tensor

from deal_core.lora.adapter import LoraFactors


def weight_delta(factors: LoraFactors, scaling: float, fan_in_fan_out: bool) -> Tensor:
    """Return what an adapter adds to the base weight, in the base weight's own layout.

    ``scaling * B @ A`` for ``nn.Linear``, whose weight is ``(d_out, d_in)``; its transpose for
    Conv1D (GPT-2), whose weight is ``(d_in, d_out)``. ``lora_A`` and ``lora_B`` mean the same in
    both, so no aggregation rule needs to know the layout. On a square layer a wrong layout
    raises no error anywhere and spoils the model: ask the layer, never the shape.

    Args:
        factors: ``A`` of shape ``(r, d_in)``, ``B`` of shape ``(d_out, r)``.
        scaling: ``lora_alpha / r``, or 1 for the retained adapter.
        fan_in_fan_out: True for Conv1D (PEFT's name for it).
    """
    delta: Tensor = scaling * (factors.B @ factors.A)
    return delta.T if fan_in_fan_out else delta
