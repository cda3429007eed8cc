"""Views of a batch of images: geometry, colours, and how to undo the geometry."""
