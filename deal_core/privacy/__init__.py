"""What protects a record or a client, what that costs, and attacks on it; no training loop."""
