"""Environments: vectors of them with true successors, and their exact state."""
