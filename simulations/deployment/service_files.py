"""What the operating system needs: systemd units, and a reverse proxy that shows sites nothing
but the fleet interface."""

from __future__ import annotations

import sys
from pathlib import Path

from simulations.deployment.server_folder import ServerFolder, ServerSettings

UNIT = """\
# {what}
# sudo cp {file} /etc/systemd/system/ && sudo systemctl enable --now {name}
[Unit]
Description={what}
After=network-online.target
Wants=network-online.target

[Service]
User={user}
ExecStart={python} -m simulations.cli {arguments}
WorkingDirectory={plain_folder}
Environment={environment}
Restart=always
RestartSec=5
KillMode=mixed
UMask=0077
CapabilityBoundingSet=
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome={home}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
ReadWritePaths={folder}
{more}
[Install]
WantedBy=multi-user.target
"""

NGINX = """\
# Sites reach the SuperLink through this, and nothing but its fleet interface.
# The SuperLink's control interface has no password: whoever reaches it can start code at every
# site. It listens on this machine alone; never forward another path.
# Include this file in the http block of nginx.conf.
server {{
    listen {port} ssl;
    server_name {names};
    ssl_certificate     {certificate};
    ssl_certificate_key {key};
    ssl_protocols       TLSv1.2 TLSv1.3;
    client_max_body_size 0;
    proxy_request_buffering off;
    proxy_buffering off;

    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{superlink_port};
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_ssl_trusted_certificate {authority};
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_ssl_server_name on;
        proxy_read_timeout 300s;
        proxy_send_timeout 300s;
    }}
    location / {{ return 403; }}
}}
"""


def server_unit(folder: ServerFolder) -> str:
    """A systemd unit that keeps the server running."""
    return _unit("Federated DEAL: server", "deal-server", "server start", folder.path, "")


def site_unit(folder: Path, data: Path) -> str:
    """A systemd unit that keeps a site running; the code it is sent can read the data and write
    the site's folder, and nothing else of this machine's."""
    return _unit(
        "Federated DEAL: site", "deal-site", "site start", folder, f"ReadOnlyPaths={_quoted(data)}"
    )


def nginx_file(folder: ServerFolder, settings: ServerSettings) -> str:
    """A server block for nginx."""
    return NGINX.format(
        port=settings.port,
        names=" ".join(settings.hosts),
        certificate=folder.certificate,
        key=folder.key,
        authority=folder.authority,
        superlink_port=settings.superlink_port,
    )


def _unit(what: str, name: str, arguments: str, folder: Path, more: str) -> str:
    code = Path(__file__).resolve().parents[2]
    # Below a home the strict setting would hide the folder itself.
    homes = {Path("/home"), Path("/root")}
    hidden = any(homes & set(Path(p).parents) for p in (folder, code, sys.executable))
    return UNIT.format(
        what=what,
        name=name,
        file=f"{name}.service",
        user=_owner(folder),
        python=_argument(sys.executable),
        arguments=f"{arguments} {_argument(folder)}",
        folder=_quoted(folder),
        plain_folder=_percent(folder),
        environment=_quoted(f"PYTHONPATH={code}"),
        home="read-only" if hidden else "yes",
        more=f"{more}\n" if more else "",
    )


def _owner(folder: Path) -> str:
    """Who made the folder: neither server nor site needs more than that."""
    try:
        return folder.owner()
    except KeyError:
        return str(folder.stat().st_uid)


def _quoted(value: Path | str) -> str:
    """As systemd reads it back: one word, whatever a path contains."""
    text = _percent(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _argument(value: Path | str) -> str:
    """The same in a command line, where variables are put in."""
    return _quoted(value).replace("$", "$$")


def _percent(value: Path | str) -> str:
    return str(value).replace("%", "%%")
