"""Runtime pruning: channels chosen anew for every input, beside those that are removed for good."""
