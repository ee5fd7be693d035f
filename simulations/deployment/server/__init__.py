"""The server's folder and commands: what its administrator runs."""
