"""What every Staffetta process shares: the wire, errors, configuration, the validator and the block-hash chain.

Imports nothing heavier than grpc and protobuf, and those only in the modules that speak them.
"""

__version__ = "0.1.0"
