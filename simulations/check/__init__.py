"""What is checked of an experiment before anything starts, all of it at once: findings, the list of
checks that need no torch, and what people should know of their rows and settings.

What needs models, methods or plans is in :mod:`simulations.run.preflight`.
"""
