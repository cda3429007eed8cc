"""Encoders, decoder, heads and the cross-view low-rank module."""
