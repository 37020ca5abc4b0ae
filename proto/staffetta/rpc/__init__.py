"""How Staffetta's processes speak gRPC: servers, channels, status, logging, registration."""
