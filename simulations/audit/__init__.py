"""``deal audit``: trainings with canaries, and the report of what they show."""
