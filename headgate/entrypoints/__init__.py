"""vLLM's ways to start a server: `python -m headgate.entrypoints.api_server --model M`."""
