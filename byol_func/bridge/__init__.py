"""What the official checkpoints and other libraries call things, in both directions."""
