"""Attention for short texts on a processor: three plain operations.

torch's fused attention saves memory on long texts. On short ones its backward pass is the most
expensive part of a step: in bfloat16 on a processor four to six times what two batched matrix
products and a softmax cost up to 256 tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deal_core.models.fast.prompt_forest import PromptForest

NAME = "deal"
LONGEST = {torch.bfloat16: 256, torch.float32: 64}
"""Tokens up to which the plain operations are the faster ones; for one query, the next word's, they
always are (measured)."""


def register_attention() -> str:
    """Make :func:`attention` known to transformers; return its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention as transformers asks for it: query ``(batch, heads, tokens, width)``, key
    and value the same or with fewer heads, of which each serves a group of queries; mask boolean
    ``(batch, 1, queries or 1, keys)``; the result is ``(batch, queries, heads, width)``. Whatever
    is not short and plain goes to transformers' own. Option ``forest``: the batch is one row of
    prompts that share what they begin with.

    Raises:
        ValueError: the model has attention sinks, which neither this nor transformers' own heeds.
    """
    if options.get("s_aux") is not None:
        raise ValueError("attention sinks")
    forest = options.pop("forest", None)
    if forest is not None:
        options |= {"dropout": dropout, "scaling": scaling}
        return _in_forest(module, (query, key, value), forest, options), None
    if _is_plain(module, query, key, attention_mask, dropout, options):
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _plain(query * factor, key, value, attention_mask), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out, None


def _in_forest(
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    forest: PromptForest,
    options: dict[str, Any],
) -> Tensor:
    """Tree by tree: heads by themselves, bodies with what is above them."""
    # A head's width after the other: the row as the projection made it.
    rows = tuple(row[0].transpose(0, 1).flatten(1) for row in states)
    _, heads, _, width = states[0].shape
    device = states[0].device
    window = options.get("sliding_window")
    found, place = [], 0
    for above, bodies in forest.trees:
        up_query, up_key, up_value = (
            _cells(row[None, place : place + above], width) for row in rows
        )
        place += above
        if above:
            mask = causal(above, window, device)
            out, _ = attention(module, up_query, up_key, up_value, mask, **options)
            found.append(out[0].flatten(1))
        for group in bodies:
            tokens = sum(group.lengths)
            own = [_cells(group.apart(row[place : place + tokens]), width) for row in rows]
            place += tokens
            keys, values = (
                torch.cat([up.expand(len(group.parts), -1, -1, -1), down], dim=2)
                for up, down in zip((up_key, up_value), own[1:], strict=True)
            )
            sees = group.sees_within(window).to(device)
            out, _ = attention(module, own[0], keys, values, sees, **options)
            found.append(group.together(out.flatten(2)))
    return torch.cat(found).view(1, -1, heads, width)


def _cells(cells: Tensor, width: int) -> Tensor:
    """``(texts, longest, heads * width)`` to ``(texts, heads, longest, width)``."""
    return cells.view(*cells.shape[:2], cells.shape[2] // width, width).transpose(1, 2)


def causal(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Return which earlier tokens a token sees, ``(1, 1, tokens, tokens)``."""
    place = torch.arange(tokens, device=device)
    behind = place[:, None] - place[None, :]
    return ((behind >= 0) & (behind < (window or tokens)))[None, None]


def _is_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> bool:
    implicit = mask is None and options.get("is_causal", getattr(module, "is_causal", False))
    special = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    longest = LONGEST.get(query.dtype, 0)
    return (
        query.device.type == "cpu"
        and (key.shape[2] <= longest or (longest > 0 and query.shape[2] == 1))
        and dropout == 0.0
        and not implicit
        and not special
    )


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Queries of a group stand below each other in one product: no key is repeated."""
    batch, groups, tokens, width = key.shape
    scores = query.reshape(batch, groups, -1, width) @ key.transpose(2, 3)
    scores = scores.view(*query.shape[:3], tokens)
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, least)
    found = scores.softmax(-1).view(batch, groups, -1, tokens) @ value
    return found.view(*query.shape[:3], -1).transpose(1, 2).contiguous()
