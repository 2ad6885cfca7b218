"""Encoders and heads behind one call: a micro-batch in, logits at its targets out."""
