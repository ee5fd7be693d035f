"""The `deal` command: experiments, engines, results."""
