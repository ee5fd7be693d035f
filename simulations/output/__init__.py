"""Text for people: console, files, TOML; nothing that computes."""
