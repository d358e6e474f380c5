"""Examples of any modality -> the packed row that a patched model takes."""
