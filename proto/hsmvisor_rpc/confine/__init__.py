"""What both sides ask of Linux to be confined by, where Python has no call for it: Landlock, capabilities, prctl."""
