"""Scripts behind the numbers in the documents: `python -m benchmarks.NAME`."""
