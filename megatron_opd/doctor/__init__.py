"""`megatron-opd doctor`: what is installed, and whether a recipe's layout and method compute what
they should."""
