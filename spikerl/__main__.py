"""`python -m spikerl`."""

from spikerl.cli import main

main()
