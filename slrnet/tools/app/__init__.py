"""A page on this machine that shows what a checkpoint sees in an image, and what its settings do."""
