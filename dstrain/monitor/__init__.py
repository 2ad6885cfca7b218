"""Numbers out: events.jsonl is the source of truth, TensorBoard and the terminal are views of it."""
