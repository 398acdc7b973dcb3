"""The teacher: a frozen Megatron model that scores the student's text at every position."""
