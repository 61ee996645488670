"""Joules: measured, or missing with a reason."""
