"""From a checkpoint to masks: predictors, the dense CRF, evaluation protocols."""
