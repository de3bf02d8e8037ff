"""What stands behind the PCRs that a TPM attests."""
