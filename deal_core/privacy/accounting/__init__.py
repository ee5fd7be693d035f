"""What is spent: composition, plans, the ledger and its certificate; nothing that adds noise."""
