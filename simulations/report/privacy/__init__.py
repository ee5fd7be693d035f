"""Privacy as pages: what an audit has shown; a ledger for a data protection officer."""
