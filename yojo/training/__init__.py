"""From preferences to a reward model."""
