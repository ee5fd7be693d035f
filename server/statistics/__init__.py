"""Rounds of statistics: what is added up once a task in the place of a trained update."""
