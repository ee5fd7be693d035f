"""Studies: grids of runs, their statistics and tables."""
