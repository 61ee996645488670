"""`spikerl reproduce`: the runs of a published table, then the table."""
