"""The HTTP face of a router: TGI's, OpenAI's and vLLM's request shapes over one gRPC stream."""
