"""What a GPU kernel's machine code says about it, found out without a GPU."""
