"""Hand-written CUDA: hands addresses to sleepkern._C."""
