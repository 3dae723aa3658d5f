"""The OpenAI-compatible server (docs/server.md), in one process with one engine."""
