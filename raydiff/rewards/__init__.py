"""One file a reward: its config and the function that it builds."""
