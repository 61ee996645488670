"""Data-parallel workers: what they exchange (`world`) and how they are started (`launch`)."""
