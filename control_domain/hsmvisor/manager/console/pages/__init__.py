"""The pages: each gathers rows, and hands them to its template."""
