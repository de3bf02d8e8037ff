"""Who may have which key, on which resource: Cedar's language behind one function, `Policies.decide`."""
