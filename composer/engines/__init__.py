"""Runs one call on one server. Knows nothing of routing, strategies or scheduling."""
