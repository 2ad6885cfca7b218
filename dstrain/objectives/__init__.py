"""What is hidden and what is scored. Masks are pure functions of (seed, epoch, document, position)."""
