"""The method DEAL and its parts; nothing that another method uses."""
