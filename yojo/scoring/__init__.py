"""Scores of whole files, exactly once per row, and what people make of them."""
