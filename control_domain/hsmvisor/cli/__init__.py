"""The `hsmvisor` command."""

import os

# gRPC's own words would stand between ours; who wants them sets the variable
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
