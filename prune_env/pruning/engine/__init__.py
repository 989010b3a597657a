"""The deployed network: what is removed for good is gone, what is inactive for an input is not computed."""
