"""One file a command; `cli.py` registers each by a line. They decide nothing: they read options,
call the part that does the work, and print. Knows no other command."""
