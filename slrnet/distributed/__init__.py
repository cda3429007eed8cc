"""Ranks of one training, and a watchdog over them."""
