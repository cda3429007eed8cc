"""Starts trainings, evaluations and pseudo labeling, on a Ray cluster or in this process."""
