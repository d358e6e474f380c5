"""Pairwise votes -> rankings of the candidates of each question, and how sure they are."""
