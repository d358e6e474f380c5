"""What a patch does to a model: attention, forward, value head, and what makes a pass cheap."""
