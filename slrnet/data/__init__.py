"""Data: class names and palettes, the manifest of a data set, and reading of its shards."""
