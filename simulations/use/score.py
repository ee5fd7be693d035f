"""How many answers of ``deal predict`` are those that a file says."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.inference.answer import Answer, Written


@dataclass(frozen=True)
class Score:
    """Attributes: ``texts`` so far; ``labels``, how many of them were answered by a label, and
    ``right``, how many rightly; ``overlap``, the ROUGE-L of the others together."""

    texts: int = 0
    labels: int = 0
    right: int = 0
    overlap: float = 0.0

    def add(self, answer: Answer | Written, expected: str) -> Score:
        """Return the score with one more text, whose right answer is ``expected``."""
        if isinstance(answer, Written):
            from deal_core.training.text_overlap import rouge_l

            more = rouge_l(answer.answer, (expected,))
            return Score(self.texts + 1, self.labels, self.right, self.overlap + more)
        right = self.right + (answer.label == expected)
        return Score(self.texts + 1, self.labels + 1, right, self.overlap)

    @property
    def line(self) -> str:
        """For people: the share of right labels, or ROUGE-L."""
        written = self.texts - self.labels
        if written:
            return f"ROUGE-L {100 * self.overlap / written:.1f} % over {written} rows"
        share = 100 * self.right / self.labels if self.labels else 0.0
        return f"accuracy {share:.1f} % ({self.right} of {self.labels} rows)"
