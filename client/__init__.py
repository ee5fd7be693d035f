"""The site: a Flower message becomes a local update, and only adapters go back."""
