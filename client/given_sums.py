"""What a site has given of a task's class sums, once and for all.

Two sums of one site, of which the second has one record more, tell that record. So the site keeps
what it gave first, noise included, and gives the same again in every later run, whatever has become
of its data. Sums in other directions, or of another model, would be a second release: there are
none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deal_core.atomic_write import atomic_write
from deal_core.privacy.interface import Refusal


@dataclass(frozen=True)
class GivenSums:
    """Attributes: the ``folder`` of a site's state in which they lie."""

    folder: Path

    def once(
        self, task: str, made_as: str, shares: int, make: Callable[[], NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """Return what was given of a task; where nothing was, what ``make`` returns, which is on
        the disk by then.

        Args:
            task: its name.
            made_as: all that decides how records are added up, but the records.
            shares: the noise in it is one of so many equal shares.
            make: adds them up.

        Raises:
            Refusal: the task's sums were given in another form, or with a smaller share of the
                noise than is counted on now.
        """
        path = self.folder / f"{hashlib.sha256(task.encode()).hexdigest()[:32]}.npz"
        if path.exists():
            kept: dict[str, NDArray[Any]] = dict(np.load(path, allow_pickle=False))
            if str(kept["made_as"]) != made_as:
                raise Refusal("policy", f"class sums of '{task}' were given before in another form")
            if int(kept["shares"]) > shares:
                raise Refusal("policy", f"class sums of '{task}' were given with less noise")
            return kept["sums"]
        sums, buffer = make(), BytesIO()
        np.savez(buffer, sums=sums, made_as=np.array(made_as), shares=np.array(shares))
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(path, buffer.getvalue(), mode=0o600, for_good=True)
        return sums
