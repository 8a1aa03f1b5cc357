"""Runnable examples; a package only so that tests and benchmarks can import their helpers."""
