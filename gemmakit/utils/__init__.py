"""Tools beside the model."""
