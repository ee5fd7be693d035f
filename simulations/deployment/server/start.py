"""``deal server start``: Flower's SuperLink with TLS, sign-in by key and a lasting memory."""

from __future__ import annotations

from simulations.deployment.secret_files import check_secret
from simulations.deployment.server.folder import ServerFolder, ServerSettings
from simulations.deployment.server.init import LOCAL
from simulations.deployment.supervise import check_free, supervise
from simulations.engines.flower_sandbox import program


def start_server(folder: ServerFolder) -> int:
    """Run the SuperLink until it is stopped.

    Returns:
        The exit code; 0 if it was asked to end.

    Raises:
        UserError: no server's folder, an unsafe key, a port in use, or it runs already.
    """
    settings = folder.settings()
    check_secret(folder.key)
    check_free(settings.superlink_port, "superlink_port in server.toml")
    if settings.metrics_port:
        check_free(settings.metrics_port, "metrics_port in server.toml")
        from simulations.deployment.server.metrics import serve

        serve(folder, settings.metrics_port)
    folder.events.write("server_started", port=settings.superlink_port)
    command = superlink_command(folder, settings)
    return supervise(command, folder.flower, folder.log, folder.pid)


def starting_lines(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Return what is about to run, and what to do next."""
    lines = [
        f"SuperLink on {LOCAL}:{settings.superlink_port}, log in {folder.log}; Ctrl-C ends it",
        f"next: deal server add-site NAME KEY.pub --dir {folder.path}, then deal submit EXPERIMENT",
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
