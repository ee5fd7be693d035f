"""``deal bench``: a file for each benchmark, and what they share."""
