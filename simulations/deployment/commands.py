"""``deal server``, ``deal site``, ``deal submit``, ``deal status``, ``deal stop``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deal_core.errors import UserError, at_home
from simulations.output import at_work, wide_console

server = typer.Typer(help="The coordinating server of several institutions.", no_args_is_help=True)
site = typer.Typer(help="One institution's own side.", no_args_is_help=True)

ServerDir = Annotated[str, typer.Option("--dir", help="The server's folder.")]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="The folder of deal server init.")]
SiteFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of deal site init.")]


@server.command("init")
def server_init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new folder.")],
    host: Annotated[
        list[str],
        typer.Option("--host", help="Name or address by which sites reach it; may be repeated."),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the reverse proxy.")] = 9443,
    superlink_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the SuperLink, local only.")
    ] = 9444,
) -> None:
    """Make certificates, settings, a proxy file and a service file."""
    from simulations.deployment.server.folder import ServerFolder, ServerSettings, init_server

    settings = ServerSettings(hosts=tuple(host), port=port, superlink_port=superlink_port)
    print(*init_server(ServerFolder(folder), settings), sep="\n")


@server.command("start")
def server_start(folder: Folder = ".") -> None:
    """Run the server until Ctrl-C."""
    from simulations.deployment.server.folder import ServerFolder, start_server

    start_server(ServerFolder(folder))


@server.command("add-site")
def server_add_site(name: str, key: Path, folder: ServerDir = ".") -> None:
    """Let the holder of KEY sign in as NAME (the server must be running)."""
    from simulations.deployment.server.folder import ServerFolder, add_site

    with at_work(wide_console(), "asking the server"):
        lines = add_site(ServerFolder(folder), name, key)
    print(*lines, sep="\n")


@server.command("remove-site")
def server_remove_site(name: str, folder: ServerDir = ".") -> None:
    """Refuse NAME's key from now on: it left, or its key was stolen or renewed."""
    from simulations.deployment.server.folder import ServerFolder, remove_site

    with at_work(wide_console(), "asking the server"):
        lines = remove_site(ServerFolder(folder), name)
    print(*lines, sep="\n")


@server.command("backup")
def server_backup(
    to: Annotated[str, typer.Argument(metavar="TO", help="A new folder.")], folder: ServerDir = "."
) -> None:
    """Copy keys, list of sites, database and runs, while the server runs."""
    from simulations.deployment.server.folder import ServerFolder, backup_server

    print(*backup_server(ServerFolder(folder), to), sep="\n")


@site.command("backup")
def site_backup(
    to: Annotated[str, typer.Argument(metavar="TO", help="A new folder.")],
    folder: SiteFolder = Path("."),
) -> None:
    """Copy settings, key, ledger and what is kept of runs, while the site takes part."""
    from simulations.deployment.site.folder import backup_site

    print(*backup_site(at_home(folder).resolve(), to), sep="\n")


@site.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    data: Annotated[Path, typer.Option(help="Folder with one folder per task.")],
    name: Annotated[str, typer.Option(help="The site's name, agreed with the server.")],
    server_address: Annotated[str, typer.Option("--server", help="HOST:PORT.")] = "SERVER:9443",
    certificate: Annotated[
        Path | None, typer.Option(help="The server's ca.crt; it is copied.")
    ] = None,
    experiment: Annotated[
        str,
        typer.Option(help="The consortium's, by a way you trust: its tasks, labels, base model."),
    ] = "",
) -> None:
    """Make a key pair and site.toml."""
    from simulations.deployment.site.folder import agreed_labels, init_site
    from simulations.run.experiment import Request, load_experiment

    agreed: dict[str, Any] = {}
    if experiment:
        asked = load_experiment(Request(experiment))
        agreed = {"labels": agreed_labels(asked), "model": asked.model.name}
    where = at_home(folder).resolve()
    print(*init_site(where, data, name, server_address, certificate, **agreed), sep="\n")


@site.command("check")
def site_check(
    folder: SiteFolder = Path("."),
    experiment: Annotated[
        str, typer.Option(help="Compare with its tasks, labels, base model.")
    ] = "",
    offline: Annotated[bool, typer.Option("--offline", help="Data and keys only.")] = False,
) -> None:
    """Read the data, try the connection, say what would leave; nothing is sent."""
    with at_work(wide_console(), "loading PyTorch") as say:
        from simulations.deployment.site.check import check_site
        from simulations.run.experiment import Request, load_experiment

        say("checking keys, data and connection")
        asked = load_experiment(Request(experiment)) if experiment else None
        report = check_site(at_home(folder).resolve(), asked, offline)
    print(*report.printed(), sep="\n")
    if report.problems:
        print(f"next: mend what is wrong ({len(report.problems)}), and check again")
        raise typer.Exit(2)
    print(f"next: deal site start {folder}")


@site.command("start")
def site_start(folder: SiteFolder = Path(".")) -> None:
    """Take part until Ctrl-C."""
    from simulations.deployment.site.folder import start_site

    start_site(at_home(folder).resolve())


def submit(
    experiment: Annotated[str, typer.Argument(help="A TOML file with data.source sites.")] = "",
    resume: Annotated[str, typer.Option(metavar="RUN", help="Continue this run.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")
    ] = None,
    folder: ServerDir = ".",
) -> None:
    """Start an experiment with the registered sites, or continue a run."""
    from simulations.deployment.server import submit as runs
    from simulations.deployment.server.folder import ServerFolder

    if bool(experiment) == bool(resume):
        raise UserError("deal submit: give an experiment, or --resume RUN, and not both")
    where, changed = ServerFolder(folder), tuple(overrides or ())
    lines = (
        runs.resume(where, resume, changed) if resume else runs.submit(where, experiment, changed)
    )
    print(*lines, sep="\n")


def status(
    run: Annotated[str, typer.Argument(help="A run; the latest when left out.")] = "",
    folder: ServerDir = ".",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Where a run and its sites stand."""
    from simulations.deployment.server.folder import ServerFolder
    from simulations.deployment.server.status import status

    status(ServerFolder(folder), run, wide_console(), as_json)


def stop(run: str, folder: ServerDir = ".") -> None:
    """End a run; its checkpoint stays."""
    from simulations.deployment.server.folder import ServerFolder
    from simulations.deployment.server.submit import stop

    print(*stop(ServerFolder(folder), run), sep="\n")


def add_to(app: typer.Typer, panel: str) -> None:
    """Put the commands of a deployment beside the others, on the help's ``panel``."""
    app.add_typer(server, name="server", rich_help_panel=panel)
    app.add_typer(site, name="site", rich_help_panel=panel)
    for verb in (submit, status, stop):
        app.command(verb.__name__, rich_help_panel=panel)(verb)
