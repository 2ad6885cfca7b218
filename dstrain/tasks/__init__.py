"""What a fine-tuning task is: where its examples come from, what is predicted, how it is scored."""
