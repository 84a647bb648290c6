"""The command mts-fast."""
