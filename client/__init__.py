"""The site: a Flower message becomes a local update; ``egress.py`` lists all that may go back."""
