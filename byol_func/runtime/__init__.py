"""What JAX gives for free and PyTorch does not; nothing of the method lives here."""
