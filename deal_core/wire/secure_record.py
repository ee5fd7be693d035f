"""The record of a secure sum in a message, and its fields."""

SECURE = "secure"
"""Name of the record."""
REQUEST, REPLY = "request", "reply"
"""What the protocol asks, and answers, in bytes of its own."""
RUN = "run"
"""Name of the run, in the first message."""
ANNOUNCEMENTS = "announcements"
"""Signed channel keys of all sites, with the terms of a round."""
LEGS = ("prepare", "confirm", "unmask")
"""Of a round, beside the one that carries the update (``mask``)."""
