"""How an answer is written: each time the likeliest word, whatever habits a model comes with."""

from __future__ import annotations

from typing import Any

from deal_core.models.prompt_tokens import PromptTokens


def greedy(prompts: PromptTokens) -> Any:
    """Return settings of ``generate``: the likeliest word each time, until the answer ends or has
    as many tokens as it may. Those that a model is published with (beams, penalties of repetition,
    least lengths) would say something else than the scores do.
    """
    from transformers import GenerationConfig

    return GenerationConfig(**greedy_settings(prompts))  # type: ignore[no-untyped-call]


def greedy_settings(prompts: PromptTokens) -> dict[str, Any]:
    """Return them by name.

    Args:
        prompts: knows the end, the longest answer, and what a decoder of its own begins with.
    """
    return {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": prompts.longest_answer,
        "eos_token_id": prompts.end[0] if prompts.end else None,
        "pad_token_id": prompts.padding,
        "decoder_start_token_id": prompts.start[0] if prompts.start else None,
    }
