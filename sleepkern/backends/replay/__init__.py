"""Looped ingestion: the methods that all backends share, and the gradients of a replay."""
