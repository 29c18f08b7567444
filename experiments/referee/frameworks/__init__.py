"""How to call the loss functions of other frameworks: a module per framework."""
