"""Objectives that several methods use."""
