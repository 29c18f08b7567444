"""Compare the gradients of other frameworks' loss functions with those of this project's algorithms."""
