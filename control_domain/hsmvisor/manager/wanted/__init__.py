"""What owners ask for: specifications, which resources they mean, and what policy says of them."""
