"""The methods that DEAL is compared with."""
