"""WebDataset tars that others wrote: walked strictly, indexed once, read at random without being rewritten."""
