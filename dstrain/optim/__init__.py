"""Parameter groups, schedules and optimizers as functions of configuration and progress."""
