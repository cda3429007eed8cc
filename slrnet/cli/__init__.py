"""The `slrnet` command."""
