"""Gradients of single records, several in a pass, none of which depends on who else is in it.

An objective is asked about each record by itself, and its loss is differentiated by itself; only
the encoder, between the tokens and the states that the objective asks for, reads several rows at
once. Torch tells what reaches every adapted layer; the gradients of its factors, row by row, are
ours (Opacus' hooks want layers that run their own forward pass).

Rounding must carry nothing from row to row. A row is as long as its own text, up to the next of
:data:`WIDTHS`; a pass has 8, 4 or 2 rows of one length, and always a mask: texts decide neither
shapes nor operations. That these give a row the same bits in each pass is a property of machine and
model, which is tried out before a record is read. Where it does not hold, for longer texts, and for
models that are asked for anything else, each record has a pass of its own. Source: docs/method.md
(M66).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import BaseModelOutput

from deal_core.lora import attach
from deal_core.lora.payload import PREFIX
from deal_core.randomness import seeded

MASK = "attention_mask"
WIDTHS = (16, 32, 48, 64)
"""Tokens of a row, padding included; beyond, rows gain little (measured)."""
ROWS = (8, 4, 2)
"""Of a pass; where one is missing, another is there twice."""
TRIED = ("76543210", "70123456", "0123", "01")
"""Which of eight rows, in what places, are compared with the eight in order."""
WAITING = 2**26
"""Numbers that gradients which wait for their turn may have (256 MB)."""
MOST_THREADS = 2
"""Of a pass that is shared. Torch gives each thread a part of a tensor, and rounds the numbers at
the end of a part, beyond whole vectors, otherwise for some functions (silu). Halves of these shapes
end with a whole vector; in smaller parts place and company would decide, and a test see little."""
ROUNDING = 1e-3
"""Relative difference of gradients that rounding may make."""

Row = tuple[Tensor, Callable[[Tensor], tuple[attach.Gradient, Tensor]]]
"""Ids of a text, ``(tokens,)``, and what makes of its states, ``(1, tokens, hidden)``, the gradient
that reaches the factors beside them, and that which reaches the states."""

log = logging.getLogger(__name__)


class _Asked(BaseException):
    """An objective asks for the states of a text of these ids, in a row of this width."""


def record_gradients(
    module: nn.Module, objective: attach.ExampleLosses, examples: Sequence[int]
) -> Iterator[attach.Gradient]:
    """Yield the gradient of each example: all of its loss, whichever way that reads a factor, as it
    is without the others; empty where it cannot be computed, so that what an example does to the
    arithmetic stays its own. Gradients of the factors stay as they are."""
    entries = sum(factor.numel() for factor in attach.learning_factors(module).values())
    most = max(ROWS[0], WAITING // entries)
    for start in range(0, len(examples), most):
        yield from _gradients(module, objective, examples[start : start + most])


def _gradients(
    module: nn.Module, objective: attach.ExampleLosses, examples: Sequence[int]
) -> Sequence[attach.Gradient]:
    def ask(*text: Any) -> Any:
        raise _Asked(*text)

    found: list[attach.Gradient] = [{}] * len(examples)
    waiting: dict[int, list[tuple[int, Row]]] = {}
    for place, example in enumerate(examples):
        try:
            with _answering(module, ask):
                found[place] = attach.example_gradient(module, objective, example)
        except _Asked as asked:
            ids, width = asked.args
            row = ids, partial(_above, module, objective, example, ids)
            waiting.setdefault(width, []).append((place, row))
        except Exception:
            continue
    for width, texts in waiting.items():
        while texts:
            count = next(count for count in ROWS if count <= len(texts) + 1)
            places, rows = zip(*texts[:count], strict=True)
            texts = texts[count:]
            for place, gradient in zip(places, _pass(module, width, rows, count), strict=True):
                found[place] = gradient
    return found


@contextmanager
def _answering(module: nn.Module, answer: Callable[[Tensor, int], Any]) -> Iterator[None]:
    """Within the block the first question for the states of one short text, to be differentiated,
    is answered by ``answer``, of ids and width; every other by the model."""
    forward, patched, asked = module.forward, "forward" in vars(module), False

    def instead(*given: Any, **named: Any) -> Any:
        nonlocal asked
        text = {key: each for key, each in named.items() if each is not None and each is not False}
        alone = torch.is_grad_enabled() and not given and text.keys() == {"input_ids", MASK}
        if alone and not asked and len(text[MASK]) == 1 and bool(text[MASK].all()):
            asked, ids = True, text["input_ids"][0]
            width = next((width for width in WIDTHS if len(ids) <= width), 0)
            if width in widths_apart(module):
                return answer(ids, width)
        return forward(*given, **named)

    module.forward = instead
    try:
        yield
    finally:
        del module.forward
        if patched:
            module.forward = forward


def _above(
    module: nn.Module, objective: attach.ExampleLosses, example: int, text: Tensor, states: Tensor
) -> tuple[attach.Gradient, Tensor]:
    """Return what the loss of an example, the ``states`` of whose ``text`` are known, gives; as of
    :data:`Row`."""
    factors, states = attach.learning_factors(module), states.requires_grad_()

    def answer(ids: Tensor, width: int) -> BaseModelOutput:
        if not torch.equal(ids, text):
            raise ValueError("another text than the one whose states are known")
        return BaseModelOutput(states)

    with _answering(module, answer):
        loss = objective.example_losses([example]).sum()
    back, *own = torch.autograd.grad(loss, [states, *factors.values()], materialize_grads=True)
    return dict(zip(factors, own, strict=True)), back


def _pass(
    module: nn.Module, width: int, rows: Sequence[Row], count: int
) -> Sequence[attach.Gradient]:
    """Return what :func:`one_pass` does, of ``count`` rows; where it fails, what each row does
    without others, and empty for the one whose fault it is."""
    try:
        filled = [*rows, *[rows[-1]] * (count - len(rows))]
        return one_pass(module, width, filled)[: len(rows)]
    except Exception:
        least = ROWS[-1]
        return [{}] if len(rows) == 1 else [_pass(module, width, [r], least)[0] for r in rows]


def one_pass(module: nn.Module, width: int, rows: Sequence[Row]) -> Sequence[attach.Gradient]:
    """Return the gradient of each row; empty where that of its states cannot be had, or is not
    finite, so that nothing of it goes back."""
    config: Any = module.config
    ids = rows[0][0].new_full((len(rows), width), config.pad_token_id or 0)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for n, (text, _) in enumerate(rows):
        ids[n, : len(text)], real[n, : len(text)] = text, True
    calls: list[tuple[Any, str, Tensor, Tensor]] = []
    with ExitStack() as noting:
        for name, layer in attach.lora_layers(module).items():
            note = partial(lambda name, own, x, out: calls.append((own, name, x[0], out)), name)
            noting.enter_context(layer.register_forward_hook(note))
        sees = real[:, None, None, :].expand(-1, 1, width, -1)
        states = module(input_ids=ids, attention_mask=sees).last_hidden_state
    into = torch.zeros_like(states)
    found: list[dict[str, Tensor] | None] = [None] * len(rows)
    for n, (text, above) in enumerate(rows):
        with suppress(Exception):
            beside, back = above(states[n : n + 1, : len(text)].detach().clone())
            if bool(back.isfinite().all()):
                found[n], into[n, : len(text)] = dict(beside), back[0]
    outputs = [out for *_, out in calls]
    reached = torch.autograd.grad(states, outputs, into, materialize_grads=True)
    for (layer, name, x, _), g in zip(calls, reached, strict=True):
        for key, each in _factor_gradients(layer, name, x.detach(), g):
            for gradient, own in zip(found, each, strict=True):
                if gradient is not None:
                    gradient[key] = gradient[key] + own if key in gradient else own
    return [gradient or {} for gradient in found]


@torch.no_grad()
def _factor_gradients(layer: Any, name: str, x: Tensor, g: Tensor) -> Sequence[tuple[str, Tensor]]:
    """Return key and gradients, ``(rows, ...)``, of what learns in a layer that was given ``x``,
    where ``g`` reaches what it made of it."""
    A, B, scaling = (
        layer.lora_A[attach.CURRENT].weight,
        layer.lora_B[attach.CURRENT].weight,
        layer.scaling[attach.CURRENT],
    )
    found = []
    if A.requires_grad:
        back = g @ (scaling * B).to(g.dtype)
        found.append((f"{PREFIX}{name}.lora_A.weight", (back.mT @ x).float()))
    if B.requires_grad:
        hidden = x @ A.to(x.dtype).T
        found.append((f"{PREFIX}{name}.lora_B.weight", (g.mT @ hidden).float() * scaling))
    return found


def widths_apart(module: nn.Module) -> Sequence[int]:
    """Return of which widths this machine gives a row of this model the same bits in every pass;
    tried out once for what learns. In bfloat16 tile units sum a row otherwise in each size of pass
    (measured): none."""
    half = any(each.dtype == torch.bfloat16 for each in module.parameters())
    if half or torch.get_num_threads() > MOST_THREADS:
        return ()
    learning = attach.learning_factors(module).items()
    shapes = {key: (factor.shape, factor.dtype) for key, factor in learning}
    key = f"{shapes} {torch.get_num_threads()} {module.training}"
    known: dict[str, Sequence[int]] = vars(module).setdefault("widths_apart", {})
    if key not in known:
        known[key] = [width for width in WIDTHS if _are_apart(module, width)]
        log.info("texts share passes in rows of %s tokens", known[key] or "no")
    return known[key]


def _are_apart(module: nn.Module, width: int) -> bool:
    """Return whether random rows, under random factors, have the gradients of an ordinary pass, to
    the bit the same in other places, beside one that gives no number, and in smaller passes;
    and no number decides what a pass computes: tensors without numbers go through it."""
    draw, learning = seeded("rows", width), attach.learning_factors(module)
    with suppress(Exception), ExitStack() as put_back:
        for factor in attach.factors_in(module).values():
            put_back.callback(setattr, factor, "data", factor.data)
            factor.data = 0.05 * torch.randn(factor.shape, generator=draw).to(factor)
        embedding = module.get_input_embeddings().weight  # type: ignore[operator]
        put_back.callback(setattr, embedding, "data", embedding.data)
        embedding.data = tokens = embedding.data.clone()
        last = len(tokens) - 1
        texts = [torch.randint(last, (width - n,), generator=draw) for n in range(7, -1, -1)]
        texts[-1][0] = last  # in no other

        def aim(states: Tensor) -> tuple[attach.Gradient, Tensor]:
            return {}, torch.randn(states.shape, generator=seeded("aim")).to(states)

        rows: list[Row] = [(text.to(tokens.device), aim) for text in texts]
        with FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.ones(ROWS[0], width, dtype=torch.long)
            module(input_ids=ids, attention_mask=ids.bool()[:, None, None, :])
        expected, text = one_pass(module, width, rows), rows[0][0][None]
        states = module(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state
        usual = torch.autograd.grad(states, [*learning.values()], aim(states)[1])
        errors = [
            (expected[0][key] - own).norm() / own.norm()
            for key, own in zip(learning, usual, strict=True)
        ]
        tokens[-1] = torch.nan
        others = [
            torch.equal(found[key], expected[n][key])
            for order in ([int(n) for n in order] for order in TRIED)
            for n, found in zip(
                order, one_pass(module, width, [rows[n] for n in order]), strict=True
            )
            for key in learning
            if n < ROWS[0] - 1
        ]
        return all(others) and bool(torch.stack(errors).max() < ROUNDING)
    return False
