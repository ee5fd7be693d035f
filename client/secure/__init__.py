"""A client's part in secure sums: keys, masks, shares, and what it keeps of them on the disk."""
