"""The loss parts of the paper (Eq. 1, 2, 4, 9) and the objective that adds them up."""
