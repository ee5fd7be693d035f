"""Attacks on the mechanisms, and what they show; nothing here runs outside an audit."""
