"""``deal server``, ``deal site``, ``deal submit``, ``deal status``, ``deal stop``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deal_core.errors import at_home
from simulations.output.console import wide_console

server = typer.Typer(help="The coordinating server of several institutions.", no_args_is_help=True)
site = typer.Typer(help="One institution's own side.", no_args_is_help=True)

ServerDir = Annotated[str, typer.Option("--dir", help="The server's folder.")]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="The folder of deal server init.")]
SiteFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of deal site init.")]


def print_lines(lines: Iterable[str]) -> None:
    """Print lines at once: a service manager reads them from a pipe."""
    for line in lines:
        print(line, flush=True)


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
    from simulations.deployment.server.folder import ServerSettings, init_server, server_folder

    settings = ServerSettings(hosts=tuple(host), port=port, superlink_port=superlink_port)
    print_lines(init_server(server_folder(folder), settings))


@server.command("start")
def server_start(folder: Folder = ".") -> None:
    """Run the server until Ctrl-C."""
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.superlink import start_server, starting_lines

    where = server_folder(folder)
    print_lines(starting_lines(where, where.settings()))
    start_server(where)


@server.command("add-site")
def server_add_site(name: str, key: Path, folder: ServerDir = ".") -> None:
    """Let the holder of KEY sign in as NAME (the server must be running)."""
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.superlink import add_site

    print_lines(add_site(server_folder(folder), name, key))


@server.command("remove-site")
def server_remove_site(name: str, folder: ServerDir = ".") -> None:
    """Refuse NAME's key from now on: it left, or its key was stolen or renewed."""
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.superlink import remove_site

    print_lines(remove_site(server_folder(folder), name))


@server.command("sites")
def server_sites(folder: ServerDir = ".") -> None:
    """List the registered sites with the fingerprints of their keys."""
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.superlink import listed

    print_lines(listed(server_folder(folder)))


@site.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    data: Annotated[Path, typer.Option(help="Folder with one folder per task.")],
    name: Annotated[str, typer.Option(help="The site's name, agreed with the server.")],
    server_address: Annotated[str, typer.Option("--server", help="HOST:PORT.")] = "SERVER:9443",
    certificate: Annotated[
        Path | None, typer.Option(help="The server's ca.crt; it is copied.")
    ] = None,
    text_column: Annotated[str, typer.Option()] = "text",
    label_column: Annotated[str, typer.Option()] = "label",
    experiment: Annotated[
        str,
        typer.Option(help="The consortium's, by a way you trust: its tasks, labels, base model."),
    ] = "",
) -> None:
    """Make a key pair and site.toml."""
    from simulations.deployment.site.init import SiteRequest, agreed_labels, init_site
    from simulations.run.experiment import Request, load_experiment

    where = at_home(folder).resolve()
    request = SiteRequest(where, data, name, server_address, certificate, text_column, label_column)
    if experiment:
        agreed = load_experiment(Request(experiment))
        request = replace(request, labels=agreed_labels(agreed), model=agreed.model.name)
    print_lines(init_site(request))


@site.command("check")
def site_check(
    folder: SiteFolder = Path("."),
    experiment: Annotated[
        str, typer.Option(help="Compare with its tasks, labels, base model.")
    ] = "",
    offline: Annotated[bool, typer.Option("--offline", help="Data and keys only.")] = False,
) -> None:
    """Read the data, try the connection, say what would leave; nothing is sent."""
    from simulations.deployment.site.check import check_site, label_of
    from simulations.run.experiment import Request, load_experiment

    asked = load_experiment(Request(experiment)) if experiment else None
    report = check_site(at_home(folder).resolve(), asked, offline)
    print_lines([f"{label_of(line):<7}{line}" for line in report.lines])
    print_lines([f"warn   {line}" for line in report.warnings])
    print_lines([f"wrong  {line}" for line in report.problems])
    if report.problems:
        print_lines([f"next: mend what is wrong ({len(report.problems)}), and check again"])
        raise typer.Exit(2)
    print_lines([f"next: deal site start {folder}"])


@site.command("start")
def site_start(folder: SiteFolder = Path(".")) -> None:
    """Take part until Ctrl-C."""
    from client.site_file import read_site
    from simulations.deployment.site.start import start_site, starting_lines

    where = at_home(folder).resolve()
    print_lines(starting_lines(where, read_site(where / "site.toml")))
    raise typer.Exit(start_site(where))


@site.command("fetch")
def site_fetch(
    folder: SiteFolder = Path("."),
    run: Annotated[str, typer.Option(help="A run; the one that ended last when left out.")] = "",
    to: Annotated[Path, typer.Option(help="A new folder.")] = Path("adapter"),
) -> None:
    """Copy the adapter of a finished run, checked, out of the site's state (docs/using.md)."""
    from simulations.deployment.site.fetch import fetch_adapter

    where = at_home(folder).resolve()
    print_lines(fetch_adapter(where, run, at_home(to).resolve()))


def submit(
    experiment: Annotated[str, typer.Argument(help="A TOML file with data.source sites.")] = "",
    resume: Annotated[str, typer.Option(metavar="RUN", help="Continue this run.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same as --set run.seed=N.")] = None,
    folder: ServerDir = ".",
) -> None:
    """Start an experiment with the registered sites, or continue a run."""
    from deal_core.errors import UserError
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.submit import Submission, submit

    if bool(experiment) == bool(resume):
        raise UserError("deal submit: give an experiment, or --resume RUN, and not both")
    submission = Submission(experiment, resume, tuple(overrides or ()), seed)
    print_lines(submit(server_folder(folder), submission))


def status(
    run: Annotated[str, typer.Argument(help="A run; the latest when left out.")] = "",
    folder: ServerDir = ".",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Where a run and its sites stand."""
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.status import status

    status(server_folder(folder), run, wide_console(), as_json)


def stop(run: str, folder: ServerDir = ".") -> None:
    """End a run; its checkpoint stays."""
    from simulations.deployment.server.folder import server_folder
    from simulations.deployment.server.submit import stop

    print_lines(stop(server_folder(folder), run))


def add_to(app: typer.Typer, panel: str) -> None:
    """Put the commands of a deployment beside the others, on the help's ``panel``."""
    app.add_typer(server, name="server", rich_help_panel=panel)
    app.add_typer(site, name="site", rich_help_panel=panel)
    for verb in (submit, status, stop):
        app.command(verb.__name__, rich_help_panel=panel)(verb)
