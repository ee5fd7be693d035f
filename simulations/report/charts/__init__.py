"""Drawings as inline SVG whose colours follow the page; nothing that knows a run."""
