"""Models of several makes, block by block, as sessions run them."""
