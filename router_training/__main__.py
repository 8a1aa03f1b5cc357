"""`python -m router_training`."""

from router_training.cli import main

main()
