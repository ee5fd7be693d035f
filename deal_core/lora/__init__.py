"""LoRA adapters: as values, attached to a model, and as arrays; no data, no training."""
