"""What can be skipped in a backbone, found by running a copy of it."""
