"""Units to sound."""
