"""One rank's training: a step, the loop around it, the optimizer, and the listener that hears of it."""
