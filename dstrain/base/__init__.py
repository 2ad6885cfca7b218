"""Ground floor: errors, configuration, ranks, seeds, storage, logs. Knows nothing above it."""
