"""Admission: which clients may connect, and how the others are refused."""
