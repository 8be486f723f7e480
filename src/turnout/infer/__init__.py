"""Generation: from a prompt to text, token by token."""

from turnout.infer.generate import GenerateConfig, generate, generate_tokens

__all__ = ["GenerateConfig", "generate", "generate_tokens"]
