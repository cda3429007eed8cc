"""Measures masks: metrics, protocols, and what went wrong where."""
