"""The `slrnet` command: a module for each subcommand, with its arguments and one call into the rooms below."""
