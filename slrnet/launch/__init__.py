"""Starts trainings, evaluations and pseudo labelling, on a Ray cluster or in this process."""
