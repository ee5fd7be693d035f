"""What Flower carries: it imports the apps that are installed, and holds no code of its own."""

from client.app import app as client_app
from server.app import app as server_app

__all__ = ["client_app", "server_app"]
