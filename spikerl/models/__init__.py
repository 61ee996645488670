"""Actors, critics, the observation normaliser, and a policy as one artefact."""
