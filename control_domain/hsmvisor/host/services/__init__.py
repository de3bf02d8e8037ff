"""One module for each gRPC service: thin, from a request to the host's own objects and back."""
