"""The PyTorch backend: ids in, ids out."""
