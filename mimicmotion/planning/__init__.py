"""What a run takes before it is run, and memory plans that keep it within a budget."""
