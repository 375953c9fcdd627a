"""Adapters, which run models of several makes block by block for a session."""
