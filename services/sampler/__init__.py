"""The sampler: one base model in an inference engine, adapters hot-swapped by version."""
