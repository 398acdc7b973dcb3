"""The engine, vLLM."""
