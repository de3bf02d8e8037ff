"""What hosts call: exchanges of reports and results for commands."""
