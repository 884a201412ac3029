"""OpenAI's interfaces: completions, responses, embeddings."""
