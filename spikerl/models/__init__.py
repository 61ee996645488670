"""Actors, critics, the observation normaliser, and policies, which combine and save them."""
