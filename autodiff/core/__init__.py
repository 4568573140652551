"""The idea: a function between flat lists of tensors, four ways to run it, and what is made of them."""
