"""How good the images are: feature networks, scores, pictures."""
