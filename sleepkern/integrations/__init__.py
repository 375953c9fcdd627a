"""Drop-ins: models of other libraries on sleepkern's kernels; importing this imports none."""
