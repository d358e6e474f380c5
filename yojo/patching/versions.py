"""What installed versions of PyTorch, Triton and transformers lack of what YOJO can use: facts for people to read."""

import inspect

OLDEST = {"torch": "2.10", "triton": "3.6", "transformers": "5.8"}  # as in pyproject.toml


def places_features():
    """Whether transformers takes vision features from outside (5.18 and later), so that no pass with images waits."""
    from transformers import Qwen3VLModel

    return "mm_encoder_outputs" in inspect.signature(Qwen3VLModel.forward).parameters


def shortcomings():
    """Sentences on what the installed versions lack; [] where they lack nothing."""
    import transformers

    from yojo_kernels import causal

    found = []
    if not places_features():
        found.append(
            f"transformers {transformers.__version__} places image features itself: passes with images or videos wait "
            "for the GPU several times (5.18 and later: never)"
        )
    if not hasattr(transformers, "Molmo2Config"):
        found.append(f"transformers {transformers.__version__} has no Molmo2 (5.20 and later)")
    if not causal.has_torch_varlen():
        found.append("torch has no varlen_attn with a scale (2.11 and later): it is not used for causal rows")
    return found
