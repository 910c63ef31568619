"""From logits to tokens: penalties, temperature, filters, seeded noise, logprobs."""
