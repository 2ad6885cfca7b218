"""Start the real launcher, watch over what it started, and start it again: one supervisor per run, beside no rank."""
