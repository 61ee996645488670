"""A composed config as validated dataclasses."""
