"""Swapping on one simulated device: workloads, baselines and the exact optimum, for swaps.py."""
