"""The record of a secure sum in a message, and its fields."""

SECURE = "secure"
"""Name of the record."""
REQUEST, REPLY = "request", "reply"
"""What the protocol asks, and answers, in bytes of its own."""
RUN = "run"
"""Name of the run, in the first message."""
ANNOUNCEMENTS, NAMES = "announcements", "names"
"""Signed channel keys of the sites of a round, and what the server calls each; with its terms."""
BLAMES = "blames"
"""Of the status, beside ``protocol``: the site whose message was refused, in hexadecimal."""
LEGS = ("prepare", "confirm", "unmask")
"""Of a round, beside the one that carries the update (``mask``)."""
