"""The same under the name of vLLM's OpenAI server, which answers on the same routes here."""
