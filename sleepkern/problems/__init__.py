"""What a call is, one file a family: its description, and the checks of what it is called with."""
