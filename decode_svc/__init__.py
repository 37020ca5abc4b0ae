"""The decode service: a thin gRPC server around an engine that generates, and the client side of the hand-off."""
