"""The experiment as frozen models, and as text; nothing that acts on it."""
