"""``study.json``: what all finished cells of a study found, read from their runs and written."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from deal_core.config.experiment import Experiment
from deal_core.config.file import Value
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import Privacy, Strict, read_results
from simulations.output import read_stored, write_texts
from simulations.run.simulate import AUTO, PRECISION, rows_of
from simulations.study import grid
from simulations.study.outcome import BOUNDS, CountsKept, Outcome

STUDY_JSON = "study.json"


class CellResult(grid.Place):
    """One finished cell."""

    settings: dict[str, dict[str, Value]]
    """Of each of its runs, by the name of the part: what it set otherwise than the study's
    ``defaults``."""
    outcome: Outcome
    rows: dict[str, str] = Field(default_factory=dict)
    """Task to the SHA-256 of its rows."""
    privacy: Privacy | None = None
    """What was spent; None: without a mechanism."""

    @property
    def precision(self) -> Value:
        """In what the frozen model computed."""
        return next(iter(self.settings.values()), {}).get(PRECISION, AUTO)


class StudyResults(Strict):
    """Schema of ``study.json``."""

    schema_version: int = 3
    study: str
    description: str
    wanted: int
    """Cells of the whole grid."""
    defaults: dict[str, Value]
    """Of every setting, by flat key."""
    cells: list[CellResult]
    """What has finished."""
    file: grid.StudyFile

    @property
    def standing(self) -> list[CellResult]:
        """The cells that the study has now, without those that an earlier form of it had."""
        asked = {place.name for place in grid.places(self.file)}
        return [cell for cell in self.cells if cell.name in asked]


def finished(cell: grid.Cell) -> bool:
    """Return whether all runs of a cell have their results."""
    return all(RunFolder(Path(run.run.out)).results.exists() for run in cell.runs.values())


def write_study(study: grid.Study, out: Path, cells: Sequence[grid.Cell]) -> StudyResults:
    """Return what the finished cells found, but for those whose clients kept their counts; written
    as ``study.json``. UserError: on different rows."""
    found = []
    for cell in filter(finished, cells):
        with suppress(CountsKept):
            found.append(_read(cell))
    require_same_rows(found)
    results = StudyResults(
        study=study.name,
        description=study.file.description,
        wanted=len(cells),
        defaults=grid.settings_of(Experiment()),
        cells=found,
        file=study.file,
    )
    write_texts(out, {STUDY_JSON: results.model_dump_json(indent=1) + "\n"})
    return results


def require_kept(out: Path) -> None:
    """Raise UserError unless the runs are there that a study's figures were found by."""
    path, cure = out / STUDY_JSON, "name another --out"
    if not path.exists():
        return
    results = read_stored(StudyResults, path, "figures of a study", f"remove it, or {cure}")
    gone = [each.name for each in results.cells if not (out / grid.CELLS / each.name).is_dir()]
    if gone:
        raise UserError(f"{path}: has figures of {gone[0]}, and its runs are not there; {cure}")


def _read(cell: grid.Cell) -> CellResult:
    from deal_core.methods import resolve_auto

    folders = {part: Path(run.run.out) for part, run in cell.runs.items()}
    parts = {part: read_results(folder) for part, folder in folders.items()}
    usual = grid.settings_of(Experiment())
    settings: dict[str, dict[str, Value]] = {}
    for part, found in parts.items():
        decided = found.config.model_copy(update={"method": resolve_auto(found.config)})
        own = grid.settings_of(grid.precise(decided))
        settings[part] = {key: value for key, value in own.items() if value != usual.get(key)}
    spent = [found.privacy for found in parts.values() if found.privacy.mechanism != "none"]
    return CellResult(
        **cell.model_dump(exclude={"runs"}),
        settings=settings,
        outcome=BOUNDS[cell.bound].combine(list(parts.values())),
        rows=rows_of(folders.values()),
        privacy=spent[0] if spent else None,
    )


ROWS_DO_NOT_DEPEND_ON = ("data.path", "data.tasks", "data.partition.")
"""Settings under which a task has the same rows: where they lie, in which turn, and whose."""


def require_same_rows(cells: Iterable[CellResult]) -> None:
    """Raise UserError where a task had other rows in one cell of a seed than in another."""
    seen: dict[tuple[object, ...], tuple[str, str]] = {}
    for cell in cells:
        settings = sorted(next(iter(cell.settings.values()), {}).items())
        asked = tuple(
            (key, str(value))
            for key, value in settings
            if key.startswith("data.") and not key.startswith(ROWS_DO_NOT_DEPEND_ON)
        )
        for task, rows in cell.rows.items():
            known, name = seen.setdefault((cell.seed, asked, task), (rows, cell.name))
            if known != rows:
                raise UserError(
                    f"the rows of task '{task}' are others in the cell {cell.name} than in {name}, "
                    "so their accuracies cannot be compared; put the data back and remove the "
                    f"folder of {cell.name}, or choose another --out"
                )
