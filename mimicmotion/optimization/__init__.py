"""AdamW in its kinds, where its states live, and the average of the weights."""
