"""What makes convolutions, losses and crops fast on CPUs; never imported on a GPU."""
