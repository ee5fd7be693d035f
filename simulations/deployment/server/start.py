"""``deal server start``: Flower's SuperLink with TLS, sign-in by key and a lasting memory."""

from __future__ import annotations

from deal_core.errors import UserError
from simulations.deployment.secret_files import check_secret
from simulations.deployment.server.folder import ServerFolder, ServerSettings
from simulations.deployment.server.init import LOCAL
from simulations.deployment.server.next_command import command
from simulations.deployment.supervise import check_free, supervise
from simulations.engines.flower_sandbox import program


def start_server(folder: ServerFolder) -> None:
    """Run the SuperLink until it is asked to end.

    Raises:
        UserError: no server's folder, an unsafe key, a port in use, it runs already, or it has
            ended by itself.
    """
    settings = folder.settings()
    check_secret(folder.key)
    check_free(
        settings.superlink_port,
        "superlink_port in server.toml, and the port that nginx.conf passes requests to",
    )
    folder.flower.connect(f"{LOCAL}:{settings.superlink_port}", folder.authority)
    if settings.metrics_port:
        check_free(settings.metrics_port, "metrics_port in server.toml")
        from simulations.deployment.server.metrics import serve

        serve(folder, settings.metrics_port)
    folder.events.write("server_started", port=settings.superlink_port)
    command = superlink_command(folder, settings)
    if supervise(command, folder.flower, folder.log, folder.pid):
        raise UserError(f"Flower's SuperLink has ended by itself; {folder.log} says why")


def starting_lines(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Return what is about to run, and what to do next."""
    lines = [
        f"SuperLink on {LOCAL}:{settings.superlink_port}, log in {folder.log}; Ctrl-C ends it",
        f"sites on this machine reach it at {settings.local_address}, without a proxy; others at "
        f"{settings.address}, where the proxy listens (nginx.conf)",
        f"next, in another terminal, for each site: "
        f"{command(folder, 'server add-site NAME KEY.pub')}",
        f"then: {command(folder, 'submit EXPERIMENT')}",
    ]
    if settings.metrics_port:
        lines.append(f"Prometheus figures on http://{LOCAL}:{settings.metrics_port}/metrics")
    return lines


def superlink_command(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Flower's own program, bound to this machine: sites come through the proxy."""
    return [
        program("flower-superlink"),
        *("--ssl-ca-certfile", str(folder.authority)),
        *("--ssl-certfile", str(folder.certificate)),
        *("--ssl-keyfile", str(folder.key)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--host", LOCAL, "--port", str(settings.superlink_port)),
        *("--database", str(folder.database)),
    ]
