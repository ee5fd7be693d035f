"""What is checked of an experiment before anything starts, without torch: its rows and settings.

What needs models, methods or plans is in :mod:`simulations.run.preflight`.
"""
