"""From the masks of all views to pseudo labels (paper Sec. 3.2); no gradient flows."""
