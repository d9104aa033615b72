"""The transports, a file each."""
