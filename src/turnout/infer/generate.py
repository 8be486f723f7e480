"""Continue a prompt, one token at a time, with a key-value cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from turnout.errors import RequestError
from turnout.infer.sampling import draw, probabilities
from turnout.infer.text_stream import TextStream
from turnout.layers.kv_cache import KVCache
from turnout.models import Decoder, ModelConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to continue a prompt."""

    max_new_tokens: int = 200  # most tokens to add
    temperature: float = 0.8  # logits are divided by it; 0: always the best token
    top_k: int = 0  # draw among this many best tokens; 0: all
    top_p: float = 0.95  # draw among the fewest best tokens with at least this probability together; 1: all
    seed: int | None = 0  # of the draw: the same seed gives the same text; none: a new one every time
    stop: tuple[str, ...] = ()  # texts that end the generation; not part of the result

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature={self.temperature} must be a number of at least 0; 0 takes the best token")
        # what torch takes as a seed
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise RequestError(f"seed={self.seed} must be at least -2**63 and below 2**64")
        if self.top_k < 0:
            raise RequestError(f"top_k={self.top_k} must be at least 0; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p} must be above 0 and at most 1; 1 draws among all tokens")
        if isinstance(self.stop, str) or not all(self.stop):
            raise RequestError(f"stop={self.stop!r} must be a tuple of texts, none of them empty")


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    eot_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...


class Generation(Iterator[str]):
    """Pieces of text as soon as they are certain, and how many tokens were drawn for them so far."""

    def __init__(self, tokens: Iterator[int], tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.num_tokens = 0
        self._pieces = self._stream(tokens, tokenizer, TextStream(stop))

    def __next__(self) -> str:
        return next(self._pieces)

    def _stream(self, tokens: Iterator[int], tokenizer: Tokenizer, stream: TextStream) -> Iterator[str]:
        for token in tokens:
            self.num_tokens += 1
            piece = stream.push(tokenizer.token_bytes(token))
            if piece:
                yield piece
            if stream.stopped:
                return
        if rest := stream.finish():
            yield rest


def generate(model: Decoder, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> Generation:
    """The text that continues `prompt`, piece by piece; an empty prompt begins a document.

    Ends at the model's end of text, at a stop string, after max_new_tokens, or when max_seq_len is full.
    Raises: RequestError, at once, if the prompt is longer than the model's max_seq_len or no Unicode text.
    """
    _require_unicode(prompt)
    tokens = generate_tokens(
        model, tokenizer.encode(prompt), config, end=tokenizer.eot_id, choices=tokenizer.vocab_size
    )
    return Generation(tokens, tokenizer, config.stop)


def generate_tokens(
    model: Decoder, prompt: Sequence[int], config: GenerateConfig, *, end: int, choices: int = 0
) -> Iterator[int]:
    """Tokens that continue `prompt`, which stands for `[end]` when empty; stop strings are the caller's.

    end: the token that ends a text, which is not given out; choices: only tokens below it are drawn, 0 for all.
    The model is in evaluation mode until the iterator ends.
    Raises: RequestError, at once, if the prompt is longer than max_seq_len or has a token the model does not know.
    """
    fed = list(prompt) or [end]
    _check_prompt(fed, model.config)
    # the last token is given out, never fed
    most = min(config.max_new_tokens, model.config.max_seq_len - len(fed) + 1)
    return _decode(model, fed, config, most=most, end=end, choices=choices or model.config.vocab_size)


def _require_unicode(prompt: str) -> None:
    # a byte of the command line that is not UTF-8 arrives as half of a surrogate pair
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not UTF-8 at character {error.start}; give it as UTF-8 text") from error


def _check_prompt(fed: Sequence[int], model: ModelConfig) -> None:
    if len(fed) > model.max_seq_len:
        raise RequestError(f"the prompt has {len(fed)} tokens; the model takes max_seq_len={model.max_seq_len}")
    if not 0 <= min(fed) <= max(fed) < model.vocab_size:
        raise RequestError(
            f"the prompt has tokens from {min(fed)} to {max(fed)}; the model knows 0 to {model.vocab_size - 1}: "
            "is this the tokenizer it was trained with?"
        )


@torch.inference_mode()
def _decode(
    model: Decoder, fed: list[int], config: GenerateConfig, *, most: int, end: int, choices: int
) -> Iterator[int]:
    device = model.head.device
    generator = _generator(config.seed, device)
    cache = KVCache(model.config.num_layers, len(fed) + most - 1)
    was_training = model.training
    model.eval()
    try:
        for _ in range(most):
            h_BSD = model(torch.tensor([fed], device=device), cache=cache).h_BSD
            logits_V = model.logits(h_BSD[0, -1])[:choices]
            share_V = probabilities(logits_V, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
            fed = [draw(share_V, generator)]
            if fed[0] == end:
                return
            yield fed[0]
    finally:
        model.train(was_training)


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)
