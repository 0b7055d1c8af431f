"""The trainer: one frozen base model, many LoRA adapters, a deterministic state machine."""
