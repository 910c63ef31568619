"""The router: requests, text, token budgets and KV blocks of one model.

It holds no tensors and runs without torch.
"""
