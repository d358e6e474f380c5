"""A reward model over HTTP: many clients, images, whole groups, the scores of `RewardModel.score`."""
