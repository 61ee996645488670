"""Exports policies to files for other programs and machines, each proven to act as the policy."""
