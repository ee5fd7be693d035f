"""Separate institutions: thin commands over Flower's SuperLink, SuperNode and ``flwr run``."""
