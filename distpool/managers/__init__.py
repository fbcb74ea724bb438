"""Ways to start worker processes, one module each (layer 8); they know addresses and byte streams, never calls."""
