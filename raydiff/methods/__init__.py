"""One file a fine-tuning method: its config, what it keeps of a trajectory, its loss."""
