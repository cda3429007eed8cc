"""The processes of one training, and a watchdog over them."""
