"""LoRA fine-tuning: data, objective, loop, checkpoints. Ray only in the thin outer modules."""
