"""What starcast knows about the ASGI servers that run it, and how it writes around them."""
