"""What each kind of node says of the gradients of its parameters."""
