"""The reading of DEAL in its authors' code, as a baseline."""
