"""What turning points cost and lose before training, the search over them, and its figure."""
