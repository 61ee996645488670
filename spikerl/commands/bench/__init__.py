"""`spikerl bench`: how fast this machine acts, updates and trains."""
