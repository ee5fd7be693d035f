"""What protects a record or a group, what that costs, and the ledger of it; no training loop. Which
part is dp-accounting's, which is ours, and what Opacus is for: docs/privacy.md, 'Who does what'."""
