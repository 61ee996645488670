"""Learning rules. Each file reads like the paper; `update(batch)` returns detached tensors."""
