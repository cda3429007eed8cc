"""Views of a batch of images: geometry, colors, and how to undo the geometry."""
