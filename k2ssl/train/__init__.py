"""Training: the loop and what it leaves behind. Knows tensors, not speech."""
