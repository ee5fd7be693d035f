"""A reverse proxy that shows sites nothing but the fleet interface."""

from __future__ import annotations

from pathlib import Path

from deal_core.errors import UserError
from simulations.deployment.server.folder import ServerFolder, ServerSettings

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
    # A site sends arrays in pieces of 5 MiB (Flower's), however large the adapter is.
    client_max_body_size 8m;
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


def nginx_file(folder: ServerFolder, settings: ServerSettings) -> str:
    """Return a server block for nginx."""
    return NGINX.format(
        port=settings.port,
        names=" ".join(settings.hosts),
        certificate=_nginx(folder.certificate),
        key=_nginx(folder.key),
        authority=_nginx(folder.authority),
        superlink_port=settings.superlink_port,
    )


def _nginx(path: Path) -> str:
    """Return one word of nginx's, whatever a path contains but ``$``, which nginx cannot quote.

    Raises:
        UserError: the path has one.
    """
    if "$" in str(path):
        raise UserError(f"{path}: nginx cannot be told of a path with $; choose another folder")
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
