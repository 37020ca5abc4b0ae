"""Moves KV blocks between pools: layout, manifest, checksums and the transports by which a receiver reads."""
