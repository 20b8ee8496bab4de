"""Everything a person asks of a store or of a daemon, one module for each kind of question."""
