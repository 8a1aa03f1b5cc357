"""Many requests from a file, answered in the order that loads models least, each exactly once."""
