"""The command line: what was typed, what Hydra composes of it, sweeps, errors as one line."""
