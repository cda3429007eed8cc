"""Writes, finds and loads checkpoints, in folders and object stores."""
