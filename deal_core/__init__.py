"""The method: LoRA adapters, retention, distillation, aggregation. Knows nothing of Flower."""
