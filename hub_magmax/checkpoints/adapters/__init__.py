"""LoRA adapters as checkpoints: their layers found in the base model, and their products computed."""
