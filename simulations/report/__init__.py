"""Reports: what a run, a study, an audit or a ledger has found, each as one page."""
