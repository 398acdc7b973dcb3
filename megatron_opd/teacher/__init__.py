"""The teacher: a frozen Megatron model that says at every position of the student's text what it
would have written."""
