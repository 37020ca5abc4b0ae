"""The `staffetta` command."""
