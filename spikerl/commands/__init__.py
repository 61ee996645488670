"""One file for each command: `main(data, argv) -> int`."""
