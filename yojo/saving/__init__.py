"""Reward models in folders, whole or not at all."""
