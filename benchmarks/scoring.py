"""Texts per second where a language model chooses among many labels: prompts and branches shared,
beside the plain model, which reads the whole sequence of each option."""

from collections.abc import Sequence
from itertools import combinations

import torch
import transformers
from torch import Tensor

import step
from deal_core.models.loading import pretrained
from deal_core.models.prompt import words
from deal_core.training.hardware import keep_memory
from measuring import Contestant, Figures, Window, measured

LABELS = tuple(f"{one} with {other}" for one, other in combinations(step.KNOWN, 2))
"""Of a few words each; which of them is right does not matter."""
SIZES = {"small": ((8, 2, 4),), "usual": ((16, 2, 4),), "full": ((64, 16, 14), (64, 16, 77))}
"""Tokens of a text, texts in a window of ours (the plain model has one), and labels."""


def deal_scores(case: step.Case, dtype: torch.dtype) -> Window:
    """Return all texts at once, as in an evaluation. ``score``: mean of the first text's."""
    keep_memory()
    model = step.fresh_model(case, dtype)
    examples, labels = step.questions(case, LABELS)
    batch = model.encode(examples, labels)

    @torch.no_grad()
    def window() -> dict[str, float]:
        found: list[Tensor] = []
        done = measured(lambda: found.append(model.scores(batch, labels)))
        return {"work": len(batch), **done, "score": float(found[0][0].mean())}

    return window


def plain_scores(case: step.Case, dtype: torch.dtype) -> Window:
    """Return the first text, an option after the other."""
    tokenizer = pretrained(transformers.AutoTokenizer, case.name)
    model = step.plain_causal(case.name, dtype).eval()
    examples, labels = step.questions(case, LABELS)
    prompt = step.prompts(case, tokenizer, examples[:1], labels)[0][0]
    names = [f" {words(label)}" for label in labels]
    answers = tokenizer(names, add_special_tokens=False)["input_ids"]

    def score(answer: list[int]) -> float:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        likely = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=1)
        return float(likely[range(len(answer)), answer].mean())

    @torch.no_grad()
    def window() -> dict[str, float]:
        found: list[float] = []
        done = measured(lambda: found.extend(map(score, answers)))
        return {"work": 1, **done, "score": sum(found) / len(found)}

    return window


def main(given: Sequence[str] | None = None, causal: str = step.SMOLLM2) -> None:
    """Measure and show case by case: ratios are to the plain model."""
    figures = Figures("scoring", __doc__, given)
    for tokens, texts, labels in SIZES[figures.size]:
        case = step.Case(causal, tokens, 1, texts, labels)
        same = (case, step.usual_precision())
        ways = [Contestant("plain", plain_scores, same), Contestant("deal", deal_scores, same)]
        figures.race(case.title, ways)


if __name__ == "__main__":
    main()
