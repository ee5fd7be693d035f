"""Privacy mechanisms at client and server, and what they are made of; no book-keeping."""
