"""One run on this machine: from what was typed to the summary; engines are elsewhere."""
