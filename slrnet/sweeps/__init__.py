"""Hyperparameter searches and the paper's ablations."""
