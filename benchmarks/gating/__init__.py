"""What `benchmarks/gates.py` is made of."""
