"""The server's part in secure sums: rounds and evaluations that it only sees as one sum."""
