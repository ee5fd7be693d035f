"""The ``deal`` command. Each verb delegates; heavy libraries load inside it."""

import errno
import inspect
import sys
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import click
import typer
from typer.models import ArgumentInfo

from deal_core.errors import UserError, at_home
from deal_core.installed import require_own_packages
from simulations import output
from simulations.deployment.commands import add_to
from simulations.report.commands import add_report_commands, report_after

app = typer.Typer(
    name="deal",
    help="Federated continual learning of LoRA adapters.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk that takes no more."""
INSTITUTIONS = "Several institutions"
MEASURING = "Measuring"

data = typer.Typer(help="Data sets as folders of tasks.", no_args_is_help=True)
app.add_typer(data, name="data")

ledger = typer.Typer(help="A site's book of private releases.", no_args_is_help=True)
app.add_typer(ledger, name="ledger", rich_help_panel=INSTITUTIONS)

ExperimentName = Annotated[
    str,
    typer.Argument(
        help="A name from `deal ls`, or a TOML file.",
        autocompletion=lambda: list(output.shipped_experiments()),
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(
        help="A name from `deal ls`, or a TOML file.",
        autocompletion=lambda: [*output.shipped_studies(), *output.shipped_experiments()],
    ),
]
RunFolderName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, or the adapter folder in it.")
]
StateFolder = Annotated[str, typer.Argument(help="A site's state directory (RUN/sites/CLIENT).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. adapter.rank=16."),
]
Disjoint = Annotated[
    bool, typer.Option("--disjoint-tasks", help="No record is in two tasks: as the policy says.")
]


def show_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"deal {version('federated-deal')}")
        except PackageNotFoundError:
            typer.echo("deal (run from its source, not installed)")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Federated continual learning of LoRA adapters."""


@app.command()
def simulate(
    experiment: ExperimentName,
    out: Annotated[str, typer.Option(help="Run folder; default: runs/NAME-seedN.")] = "",
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same as --set run.seed=N.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="inprocess (default), flower or loopback.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Run an experiment on this machine and report accuracy and forgetting."""
    from simulations.run.experiment import Request
    from simulations.run.simulate import simulate

    request = Request(
        experiment,
        out=out,
        overrides=tuple(overrides or ()),
        seed=seed,
        engine=engine,
        resume=resume,
    )
    console = output.wide_console()
    raise typer.Exit(simulate(request, console, lambda folder: report_after(folder, console)))


@app.command()
def check(
    experiment: ExperimentName,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
) -> None:
    """Find all that is wrong with an experiment and its data; nothing starts (docs/checking.md)."""
    from simulations.run.check import check as run

    raise typer.Exit(run(experiment, tuple(overrides or ()), strict, output.wide_console()))


@app.command()
def predict(
    folder: RunFolderName,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to label; or --file.")
    ] = None,
    file: Annotated[str, typer.Option(help="CSV, JSONL, Parquet, or TXT (a text a line).")] = "",
    column: Annotated[
        str, typer.Option("--text-column", "--column", help="Of the file's text; or the run's.")
    ] = "",
    pair_column: Annotated[str, typer.Option(help="Joined to it; or the run's.")] = "",
    label_column: Annotated[
        str, typer.Option(help="Of the right answer: how many are right is said at the end.")
    ] = "",
    task: Annotated[str, typer.Option(help="Choose among its labels; default: all learnt.")] = "",
    model: Annotated[
        str, typer.Option(help="Where the base model lies, if not where the run had it.")
    ] = "",
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="A label less probable is 'unsure'.")
    ] = 0.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit probabilities to the right answers; kept.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json/--plain", help="JSON lines, or lines for people.")
    ] = True,
) -> None:
    """Label texts with what a run has learnt (docs/using.md)."""
    from simulations.use.predict import PredictRequest
    from simulations.use.predict import predict as run

    request = PredictRequest(
        folder,
        texts=tuple(texts or ()),
        file=file,
        column=column,
        pair_column=pair_column,
        label_column=label_column,
        task=task,
        base=model,
        threshold=threshold,
        calibrate=calibrate,
        as_json=as_json,
    )
    score = run(request, typer.echo)
    if score is not None:
        typer.echo(score.line, err=True)  # a program may read the lines


@app.command()
def export(
    folder: RunFolderName,
    to: Annotated[str, typer.Option(help="A new folder.")],
    model: Annotated[
        str, typer.Option(help="Where the base model lies, if not where the run had it.")
    ] = "",
) -> None:
    """Write a folder that PEFT loads without deal (docs/using.md)."""
    from rich.console import Console

    with output.at_work(Console(stderr=True), "loading the model and writing it"):
        from deal_core.inference.folder import find_adapter

        find_adapter(at_home(folder))  # before torch loads
        from simulations.use.export import export as run

        lines = run(folder, to, model)
    for line in lines:
        typer.echo(line)


@app.command(rich_help_panel=MEASURING)
def study(
    study: StudyName,
    out: Annotated[str, typer.Option(help="Folder; default: runs/study-NAME.")] = "",
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="In the place of its seeds, e.g. 0,1.")] = "",
    epsilon: Annotated[
        str, typer.Option(help="Privacy budgets of every arm, e.g. 1,8,inf (inf: without privacy).")
    ] = "",
    only: Annotated[
        str, typer.Option(help="Run these cells now, e.g. deal,lwf or 'deal.*.seed0'.")
    ] = "",
    jobs: Annotated[
        int, typer.Option(min=0, help="Runs at a time; 0: one per core, or per GPU.")
    ] = 0,
) -> None:
    """Run a grid of methods, orders, seeds, settings or budgets; the same command continues it."""
    from simulations.study.command import run_study, study_folder

    console = output.wide_console()
    code = run_study(
        study,
        console,
        out=out,
        overrides=tuple(overrides or ()),
        seeds=seeds,
        epsilon=epsilon,
        only=only,
        jobs=jobs,
    )
    report_after(study_folder(study, out), console)
    raise typer.Exit(code)


@app.command(rich_help_panel=MEASURING)
def audit(
    experiment: ExperimentName,
    epsilon: Annotated[str, typer.Option(help="Budgets.")] = "1,8",
    out: Annotated[str, typer.Option(help="Folder; default: runs/audit-NAME.")] = "",
    overrides: Overrides = None,
    client: Annotated[int, typer.Option(min=0, help="The site that is attacked.")] = 0,
    canaries: Annotated[
        int, typer.Option(min=2, help="Gradients, as many as there is room for.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the canaries.")] = 0,
    repetitions: Annotated[int, typer.Option(min=1, help="Trainings for every budget.")] = 8,
    records: Annotated[
        int, typer.Option(min=0, help="Real ones of a task beside the canaries; 0: all.")
    ] = 32,
    membership: Annotated[
        bool, typer.Option("--membership", help="Find members in class sums and adapters.")
    ] = False,
) -> None:
    """Attack what was built: an empirical lower bound on epsilon, and membership inference."""
    from simulations.audit.command import audit_folder, run_audit

    console = output.wide_console()
    folder = audit_folder("membership" if membership else "audit", experiment, out)
    if membership:
        from simulations.audit.membership import run_membership

        run_membership(experiment, folder, overrides or (), seed, client, console)
        report_after(folder, console)
        return
    code = run_audit(
        experiment,
        folder,
        console,
        epsilon=epsilon,
        overrides=overrides or (),
        client=client,
        canaries=canaries,
        seed=seed,
        repetitions=repetitions,
        records=records,
    )
    if (folder / "audit.json").is_file():
        report_after(folder, console)
    raise typer.Exit(code)


@app.command("demo", rich_help_panel=INSTITUTIONS)
def demo(
    folder: Annotated[str, typer.Option("--dir", help="A new folder.")] = "runs/demo",
    sites: Annotated[int, typer.Option(min=2, max=3, help="Two or three.")] = 3,
) -> None:
    """Run a server and sites on this machine: keys, TLS, a whole run, and the end of it all."""
    from simulations.deployment.demo import run_demo

    console = output.wide_console()
    raise typer.Exit(run_demo(folder, sites, console, lambda run: report_after(run, console)))


@app.command("ls")
def list_shipped() -> None:
    """List the experiments and studies that come with deal."""
    kinds = {"simulate": output.shipped_experiments(), "study": output.shipped_studies()}
    width = max(len(name) for files in kinds.values() for name in files)
    for verb, files in kinds.items():
        for name, description in output.descriptions(files).items():
            typer.echo(f"deal {verb.ljust(8)} {name.ljust(width)}  {description}")


@ledger.command("verify")
def ledger_verify(
    folder: Annotated[str, typer.Argument(help="A site's state directory.")] = "",
    certificate: Annotated[str, typer.Option(help="A file that `export` wrote.")] = "",
    disjoint_tasks: Disjoint = False,
) -> None:
    """Check that nothing was changed and say what was spent; or check a certificate."""
    from simulations.report.ledger import verify

    if not folder and not certificate:
        raise UserError("deal ledger verify: name a state directory, a --certificate, or both")
    verify(folder, certificate, output.wide_console(), disjoint_tasks)


@ledger.command("export")
def ledger_export(
    folder: StateFolder,
    out: Annotated[str, typer.Option(help="The JSON file to write.")] = "certificate.json",
    disjoint_tasks: Disjoint = False,
) -> None:
    """Write a signed certificate of all that was spent."""
    from simulations.report.ledger import export

    export(folder, out, output.wide_console(), disjoint_tasks)


@data.command("import-cl-benchmark")
def data_import(
    folder: Annotated[str, typer.Argument(help="CL_Benchmark, or a folder of TRACE's tasks.")],
    out: Annotated[str, typer.Option(help="Folder to make, one folder a task in it.")],
    layout: Annotated[
        str, typer.Option("--format", help="cl-benchmark (O-LoRA, SAPT) or trace.")
    ] = "cl-benchmark",
) -> None:
    """Turn a public benchmark into folders of tasks and an experiment file."""
    from simulations.importing import import_benchmark

    import_benchmark(Path(folder), Path(out), layout, output.wide_console())


add_report_commands(app)  # after the verbs above, which come first on the help's page
add_to(app, INSTITUTIONS)


def command() -> click.Command:
    """Return ``deal`` as click knows it, every argument with its text."""
    return with_argument_help(typer.main.get_command(app))


def with_argument_help(command: click.Command) -> click.Command:
    """Return the command; its arguments, and those of all commands below it, have the texts of
    their ``Annotated[..., typer.Argument(help=...)]``."""
    for below in getattr(command, "commands", {}).values():
        with_argument_help(below)
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    if arguments and command.callback is not None:
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        for argument in arguments:
            told = [e for e in get_args(hints[str(argument.name)]) if isinstance(e, ArgumentInfo)]
            argument.help = told[0].help if told else None
    return command


def closed(error: OSError) -> str:
    """Return what is wrong with a file, and the cure, on one line."""
    cure = "make room" if error.errno in FULL else "check the path, and who may read and write it"
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror}; {cure}"


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    try:
        require_own_packages()
        command()(prog_name="deal")
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from simulations.engines import own_fault

        fault = own_fault(error)
        # a path of the user's that no verb has expected to be closed to it
        if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
            fault = fault or closed(error)
        if not fault:
            raise
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
