"""The report of one run: what its folder says, and the sections of its page."""
