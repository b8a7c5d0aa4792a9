"""What a model would need, and what this machine has."""
