"""Draws masks, panels and charts."""
