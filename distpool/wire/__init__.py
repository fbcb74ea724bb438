"""What travels: frames, messages, the handshake, and the codec of user objects (layer 1, no I/O)."""
