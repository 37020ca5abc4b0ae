"""The prefill service: a thin gRPC server around an engine that computes prompts and holds their KV until read."""
