"""What pruning does to a network: groups, plans, surgery, importance, measurement. No data set, no decision process."""
