"""What a user runs: the command line, its benchmark, the check of the fast path on the user's machine."""
