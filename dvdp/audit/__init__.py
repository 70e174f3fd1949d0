"""Which level, lift or solver costs a trained model its score."""
