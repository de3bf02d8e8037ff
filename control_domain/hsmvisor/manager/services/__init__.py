"""One module for each gRPC service: thin, from a request to the manager's own objects and back."""
