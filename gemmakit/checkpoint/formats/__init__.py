"""One file of each format as named arrays of the PyTorch layout, read lazily, one tensor at a time.

Names are data: a table a format, in google.py (released PyTorch files), msgpack.py (Flax) and orbax.py (google-deepmind
/gemma), gguf.py (llama.cpp).
"""
