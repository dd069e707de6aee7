"""One file a model family: its config and the LatentModel that it builds."""
