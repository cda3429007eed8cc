"""The masks of which a run is least sure, for a person to accept, discard or redraw; the next training learns them."""
