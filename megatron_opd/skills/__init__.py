"""Skills: banks of privileged texts, and the choice among them."""
