"""The arithmetic of RLHF as pure functions over padded [B, T] tensors: no models, no ranks."""
