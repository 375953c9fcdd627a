"""`make gpu-check`: what a GPU machine runs in one call of 480 seconds, in order of worth."""
