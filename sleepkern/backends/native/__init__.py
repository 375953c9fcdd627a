"""What all backends of compiled code share: the module _C, and tensors as it takes them."""
