"""One connection with many channels: Centrifugo's client protocol, for its official clients."""
