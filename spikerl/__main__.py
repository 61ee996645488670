"""`python -m spikerl`."""

from spikerl.cli.main import main

main()
