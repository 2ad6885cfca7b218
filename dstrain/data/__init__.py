"""From raw text to a deterministic, resumable stream of packed micro-batches. Knows nothing of models or masks."""
