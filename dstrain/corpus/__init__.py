"""Documents before they are shards: readers, filters, the global shuffle, tokenising, and the tasks that build a dataset."""
