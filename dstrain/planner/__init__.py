"""Look at a run before it starts: memory, time, traffic, failures and money, from the configuration alone."""
