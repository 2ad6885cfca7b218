"""The one loop and the one engine (DeepSpeed, on a CPU too)."""
