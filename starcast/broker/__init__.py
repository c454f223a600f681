"""The way to a broker and back: what is sent, what is subscribed to, and the connection to it."""
