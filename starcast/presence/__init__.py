"""Presence: who is on a channel, on all workers together.

Every worker knows all members of all workers. Each tells the others what changes with its own, on
one internal channel, and now and then how many changes that makes: who has missed one asks for the
whole. So there is nothing in the broker that could be left behind, and it is the same with every
broker and in memory.
"""
