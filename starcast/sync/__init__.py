"""Waiting: for other event loops, for space in a queue, and for no longer than so many seconds."""
