"""An authority that speaks ACME (RFC 8555), with renewal information (RFC 9773) where it has that."""
