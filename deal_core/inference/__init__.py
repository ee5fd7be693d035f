"""Answers of a learnt model from its adapter folder; no training, no data source, no method."""
