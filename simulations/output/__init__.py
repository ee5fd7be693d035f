"""Text for people: console, files, Markdown, TOML; nothing that computes."""
