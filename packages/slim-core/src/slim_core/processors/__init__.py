"""One module per processor of the protocol."""
