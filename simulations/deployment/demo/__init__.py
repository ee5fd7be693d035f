"""A whole deployment on this machine, on the embedded data: started, run to its end, stopped."""
