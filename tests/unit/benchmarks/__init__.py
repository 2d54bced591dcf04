"""Logic of the scripts in `benchmarks/`."""
