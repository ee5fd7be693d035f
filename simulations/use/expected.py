"""Right answers of a file, held against the labels that a run can answer with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from deal_core.errors import UserError, nearest
from deal_core.inference.folder import Inference
from simulations.use.texts import Text

SHOWN = 10
"""Labels that a message lists."""


@dataclass(frozen=True)
class Labels:
    """Attributes: ``known``, those to choose from; ``whose``, in words."""

    known: frozenset[str]
    whose: str

    def check(self, texts: Iterable[Text], column: str) -> str:
        """Return a warning of right answers that are none of the labels; empty: all are.

        Args:
            texts: of the file.
            column: that its right answers are in.

        Raises:
            UserError: none of them is a label: the column is another.
        """
        counts = Counter(text.expected for text in texts if text.expected is not None)
        strange = [value for value in counts if value not in self.known]
        if not strange:
            return ""
        first = f"'{strange[0]}' is no label of {self.whose}"
        if len(strange) == len(counts):
            raise UserError(
                f"--label-column {column}: {first}, nor is any other value in the column"
                f"{nearest(strange[0], self.known)}; labels are: {self._listed()}; name the "
                "column that holds them"
            )
        rows = sum(counts[value] for value in strange)
        more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        return (
            f"warning: {rows} of {counts.total()} rows: {first}{more}; these rows count as "
            "answered wrongly"
        )

    def _listed(self) -> str:
        names = sorted(self.known)
        more = len(names) - SHOWN
        return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def labels_to_choose_from(inference: Inference, task: str) -> Labels | None:
    """Return the labels of a task, or of all learnt; None: it is unknown, or answers are texts."""
    if task:
        known = frozenset(inference.all_tasks.get(task, ()))
        return Labels(known, f"task '{task}'") if known else None
    known = frozenset().union(*inference.learnt.values())
    return Labels(known, "the tasks learnt") if known else None
