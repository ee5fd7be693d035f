"""``deal submit``, ``deal stop``: an experiment becomes a run of the federation, goes on, ends."""

import secrets
from pathlib import Path

from client.site_file import NAME
from deal_core.config import file
from deal_core.config.experiment import Experiment
from deal_core.data import SitesSource
from deal_core.errors import UserError
from server.folder import EventLog, RunEvent, RunFolder, exclusive_lock, read_events
from simulations.deployment.server.folder import ServerFolder, registered
from simulations.engines.flower import BUNDLE, CONNECTION
from simulations.output import toml_lines
from simulations.run.experiment import Request, load_experiment
from simulations.run.simulate import check_folder, record, recorded, write_settings

STARTS = "starts.jsonl"
"""In the run folder: Flower's id of the run, one line for each time that it was started."""


def submit(folder: ServerFolder, experiment: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """Start a new run of a TOML file, or a shipped name; return the lines to print."""
    folder.settings()
    asked = load_experiment(Request(experiment, "unnamed", overrides, engine="deployment"))
    name = f"{Path(experiment).stem}-seed{asked.run.seed}-{secrets.token_hex(3)}"
    if not NAME.fullmatch(name):
        raise UserError(f"{experiment}: rename it to letters, digits, '-' and '_'")
    chosen = asked.federation.sites or tuple(registered(folder))
    _require_registered(folder, chosen)
    return _start(folder, _at(asked, folder.runs / name, chosen), "started")


def resume(folder: ServerFolder, name: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """Continue a run, under the settings that it was started with, but for ``overrides`` of how
    long a round waits, and for how many. A site that has left meanwhile is absent from it, as one
    that is switched off.

    Returns:
        The lines to print.

    Raises:
        UserError: no such run, it has not ended, fewer of its sites are registered than its quorum,
            an override of another key, or the server does not answer.
    """
    folder.settings()
    path = run_folder(folder, name)
    before = recorded(path)
    for override in overrides:
        if override.partition("=")[0] not in file.PATIENCE:
            raise UserError(
                f"--set {override}: a run goes on with the settings that it was started with, but "
                f"for {' and '.join(file.PATIENCE)}; submit the experiment again"
            )
    if overrides:
        changed = file.apply_overrides(before.model_dump(mode="json"), overrides)
        before = file.parse_experiment(changed, "--set")
    chosen = before.federation.sites
    still = registered(folder).keys() & set(chosen)
    if len(still) < max(1.0, before.federation.quorum * len(chosen)):
        _require_registered(folder, chosen)
    experiment = _at(before, path, chosen)
    lines = _start(folder, experiment.changed(run={"resume": True}), "continued")
    write_settings(experiment)
    return lines


def stop(folder: ServerFolder, name: str) -> list[str]:
    """Ask the SuperLink to end the run; return the lines to print."""
    folder.settings()
    run = run_folder(folder, name)
    numbers = [start["run"] for start in reversed(starts(run))]
    if not numbers:
        return [f"{run.name} was never started; its folder is {run}"]
    alive = (n for n in numbers if not flower_status(folder, n).startswith("finished"))
    number = next(alive, numbers[0])
    folder.flower.ask("stop", number, CONNECTION)
    folder.events.write("run_stopped", run=run.name, flower=number)
    return [
        f"stopped {run.name}; the checkpoint after its last step stands",
        f"next: {folder.command(f'submit --resume {run.name}')} goes on from there",
    ]


def run_folder(folder: ServerFolder, name: str) -> Path:
    """Return the folder of a run; without a name of the latest; UserError: there is none."""
    runs = {path.name: path for path in folder.runs.glob("*") if path.is_dir()}
    if not runs:
        raise UserError(
            f"{folder.runs}: no run yet; start one with {folder.command('submit EXPERIMENT')}"
        )
    if not name:
        return max(runs.values(), key=lambda run: max((e["time"] for e in starts(run)), default=0))
    if Path(name).name not in runs:
        raise UserError(f"no run '{name}'; there are: {', '.join(sorted(runs))}")
    return runs[Path(name).name]


def check(experiment: Experiment) -> None:
    """Raise :class:`UserError` for what is wrong without any look at the sites' data."""
    if experiment.data.source != "sites":
        raise UserError(
            f"data.source is '{experiment.data.source}'; a run with sites has data.source = "
            '"sites" and [data.labels] with TASK = ["label", ...]'
        )
    if experiment.privacy.noise == "seeded":
        raise UserError(
            "privacy.noise is 'seeded': whoever knows the seed can take the noise off, so it "
            "gives no protection; leave it out, or set it to 'secure'"
        )
    from server.plan import make_plan
    from simulations.run.model_checks import check_names

    file.from_run_config(file.to_run_config(experiment))  # as the server will read it
    tasks = SitesSource(experiment.data).task_names()
    check_names(experiment)
    clients = [str(number) for number in range(experiment.federation.clients)]
    make_plan(experiment, tasks, clients)


def starts(run: Path) -> list[RunEvent]:
    """Return every start of a run: ``run`` (Flower's id) and ``time``."""
    return read_events(run / STARTS)


def flower_status(folder: ServerFolder, number: str) -> str:
    """Return what Flower says of a start of a run by its id; empty where it cannot be asked."""
    try:
        runs = folder.flower.ask("list", CONNECTION, "--run-id", number)["runs"]
    except UserError:
        return ""
    return str(runs[0]["status"]) if runs else "unknown"


def _require_registered(folder: ServerFolder, chosen: tuple[str, ...]) -> None:
    known = registered(folder)
    missing = [name for name in chosen or ("NAME",) if name not in known]
    if missing:
        said = f"site '{missing[0]}' is not registered" if chosen else "no site is registered"
        raise UserError(f"{said}; {folder.command(f'server add-site {missing[0]} KEY.pub')}")


def _at(experiment: Experiment, out: Path, sites: tuple[str, ...]) -> Experiment:
    return experiment.changed(
        run={"out": str(out), "engine": "deployment"},
        federation={"sites": sites, "clients": len(sites)},
        data={"path": "", "files": {}, "hub": {}},
    )


def _start(folder: ServerFolder, experiment: Experiment, done: str) -> list[str]:
    check(experiment)
    run = Path(experiment.run.out)
    where = (
        f"{folder.command(f'status {run.name}')} says how far it is, and "
        f"{folder.command(f'stop {run.name}')} ends it"
    )
    with exclusive_lock(RunFolder(run).launching, where):
        check_folder(experiment)
        if experiment.run.resume:
            _require_ended(folder, run, where)
        record(experiment)
        config = run / "run-config.toml"
        config.write_text(toml_lines(file.to_run_config(experiment)), encoding="utf-8")
        answer = folder.flower.ask("run", str(BUNDLE), CONNECTION, "--run-config", str(config))
        number = str(answer["run-id"])
        EventLog(run / STARTS).write("started", run=number)
    sites = list(experiment.federation.sites)
    folder.events.write("run_submitted", run=run.name, flower=number, sites=sites)
    return [
        f"{done} {run.name} with {len(sites)} sites (Flower's run {number})",
        f"results go to {run}",
        f"next: {folder.command(f'status {run.name}')}",
        f"to end it: {folder.command(f'stop {run.name}')}",
    ]


def _require_ended(folder: ServerFolder, run: Path, where: str) -> None:
    """Raise where the run has not ended, or is about to begin."""
    with exclusive_lock(RunFolder(run).writing, where):
        pass
    begun, events = starts(run), list(read_events(RunFolder(run).metrics))
    if not begun or (events and events[-1]["time"] > begun[-1]["time"]):
        return  # it has begun, and has ended since
    found = flower_status(folder, begun[-1]["run"])
    if found and not found.startswith(("finished", "unknown")):
        raise UserError(
            f"{run.name} was continued a moment ago and has not begun; wait, and see "
            f"{folder.command(f'status {run.name}')}"
        )
