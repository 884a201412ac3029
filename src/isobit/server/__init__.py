"""An OpenAI-compatible HTTP server over the engine: thin, and answers that can be checked."""
