"""Reports: what a run, a study, budgets, an audit or a ledger has found, each as one page."""
