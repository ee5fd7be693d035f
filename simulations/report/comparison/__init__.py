"""Runs side by side: what ``deal compare`` reads, prints, and writes as a page and a CSV."""
