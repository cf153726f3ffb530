"""Helpers of several test modules: small nets, teams, data and runs, and plain counterparts."""
