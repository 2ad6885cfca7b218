"""Notice a stop request or another owner of the run, agree on it, and leave with a meaningful exit code."""
