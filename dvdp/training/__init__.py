"""Training: the loop, and the small parts it is made of."""
