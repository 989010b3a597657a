"""The decision process: pure dynamics, what is seen, what is paid, and its Gymnasium shells."""
