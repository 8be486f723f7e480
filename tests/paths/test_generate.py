"""Generation: what comes out is what full recomputation gives, cut where it must be, and nothing else changes."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.contracts import RouterConfig
from turnout.data.prepare import Dataset
from turnout.errors import NonFiniteError, RequestError
from turnout.infer import GenerateConfig, generate, generate_tokens
from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.layers.kv_cache import KVCache
from turnout.layers.mla import MLAConfig
from turnout.layers.moe import MoEConfig
from turnout.models import Decoder, ModelConfig
from turnout.routers import GShardTop2, Hash, TopK
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest

GREEDY = GenerateConfig(temperature=0.0)
VOCAB, LONGEST = 37, 24
KINDS: dict[str, AttentionKind] = {
    "gqa": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    "window and sinks": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=4, full_every=2, sinks=True),
    "mla": MLAConfig(num_heads=2, q_rank=8, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8),
}
# by what a token means, and by its id, which must be its own when it comes alone
ROUTERS: dict[str, RouterConfig] = {"topk": TopK(k=2), "hash": Hash(k=2, scale=2.0)}


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6, 7]], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_what_full_recomputation_gives(kind: str, router: str, prompt: list[int]) -> None:
    model, tokens = _model(KINDS[kind], ROUTERS[router]), list(prompt)
    got = list(generate_tokens(model, prompt, replace(GREEDY, max_new_tokens=12), end=-1))
    with torch.no_grad():
        while len(tokens) < len(prompt) + 12:
            h_BSD = model.eval()(torch.tensor([tokens])).h_BSD
            tokens.append(int(model.logits(h_BSD[0, -1]).argmax()))
    assert got == tokens[len(prompt) :]


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [3, 1, 1, 4]], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_text_in_pieces_gives_the_logits_and_the_experts_of_the_whole(router: str, chunks: list[int]) -> None:
    model, tokens_BS = _model(router=ROUTERS[router]).eval(), torch.randperm(VOCAB)[:9].view(1, 9)
    cache = KVCache(model.config.num_layers, 9)
    with torch.no_grad():
        whole = model(tokens_BS)
        parts = [model(part, cache=cache) for part in tokens_BS.split(chunks, dim=1)]
    h_BSD = torch.cat([part.h_BSD for part in parts], dim=1)
    torch.testing.assert_close(model.logits(h_BSD), model.logits(whole.h_BSD), rtol=1e-5, atol=1e-5)
    for layer, assignment in enumerate(whole.assignments):
        got = torch.cat([part.assignments[layer].expert_N for part in parts])
        assert torch.equal(got, assignment.expert_N)


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_generator_alone() -> None:
    model, config = _model(), GenerateConfig(max_new_tokens=15, temperature=2.0, top_p=1.0)
    state = torch.get_rng_state()
    runs = [tuple(generate_tokens(model, [1], replace(config, seed=seed), end=-1)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(generate_tokens(model, [1], replace(config, seed=None), end=-1)) for _ in range(3)}) > 1


def test_generation_stops_after_max_new_tokens_or_when_the_model_is_full() -> None:
    def count(prompt_tokens: int, most: int) -> int:
        config = replace(GREEDY, max_new_tokens=most)
        return len(list(generate_tokens(_model(), [1] * prompt_tokens, config, end=-1)))

    assert (count(1, 1), count(5, 7)) == (1, 7)
    assert count(LONGEST - 2, 100) == 3
    assert count(LONGEST, 100) == 1


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([1] * (LONGEST + 1), rf"prompt has {LONGEST + 1} tokens; the model takes max_seq_len={LONGEST}"),
        ([1, VOCAB], rf"tokens from 1 to {VOCAB}; the model knows 0 to {VOCAB - 1}"),
        ([-1], r"tokens from -1 to -1"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_before_the_first_token(prompt: list[int], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        generate_tokens(_model(), prompt, GREEDY, end=0)


def test_the_model_is_left_as_it_was_found() -> None:
    model = _model(router=GShardTop2()).train()
    tokens = generate_tokens(model, [1], GREEDY, end=-1)
    next(tokens)
    # between two tokens the caller is not in inference mode
    assert not torch.is_inference_mode_enabled()
    assert not model.training
    tokens.close()  # type: ignore[attr-defined]
    assert model.training
    list(generate_tokens(model, [1], GREEDY, end=-1))
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fields", [{}, {"stop": ("wo",)}, {"max_new_tokens": 1}], ids=str)
def test_however_the_text_ends_the_model_trains_on(fields: dict[str, Any]) -> None:
    story = Story([b"one", b"two", b"three"])
    story.model.train()
    pieces = story.tell("one", **fields)
    assert "".join(pieces) in ("twothree", "t", "two", "")
    assert story.model.training


def test_a_broken_model_says_so() -> None:
    model = _model()
    with torch.no_grad():
        model.norm.get_parameter("weight_D").fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"largest of the model's logits is nan"):
        list(generate_tokens(model, [1], GREEDY, end=-1))


def test_tokens_the_tokenizer_does_not_have_are_never_drawn() -> None:
    config = GenerateConfig(max_new_tokens=20, temperature=100.0, top_p=1.0)
    drawn = {
        t for seed in range(10) for t in generate_tokens(_model(), [1], replace(config, seed=seed), end=-1, choices=5)
    }
    assert drawn == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, r"temperature=-0\.1 must be a number of at least 0"),
        ({"temperature": float("nan")}, r"temperature=nan must be"),
        ({"temperature": float("inf")}, r"temperature=inf must be"),
        ({"top_k": -1}, r"top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be above 0 and at most 1"),
        ({"stop": ("",)}, r"stop=\('',\) must be a tuple of texts, none of them empty"),
        ({"stop": "end"}, r"stop='end' must be a tuple"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_legal_values(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        GenerateConfig(**fields)


def test_text_comes_in_pieces_and_ends_at_the_end_of_text() -> None:
    story = Story([b"Once", b" upon", b" a", b" time"])
    assert list(story.tell("Once")) == [" upon", " a", " time"]
    assert list(story.tell("Once", max_new_tokens=2)) == [" upon", " a"]


def test_an_empty_prompt_begins_a_document() -> None:
    assert list(Story([b"Once", b" upon"]).tell("")) == ["Once", " upon"]


def test_a_character_of_several_tokens_comes_whole_and_an_unfinished_one_not_at_all() -> None:
    snowman = "\u2603".encode()
    story = Story([b"a", snowman[:1], snowman[1:2], snowman[2:] + b"!"])
    assert list(story.tell("a")) == ["\u2603!"]
    assert list(story.tell("a", max_new_tokens=2)) == []
    assert list(Story([b"a", b"b" + snowman[:2], b"c"]).tell("a")) == ["b", "\ufffdc"]


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (("time",), ["one", " two ", "three "]),
        (("o three",), ["one", " tw"]),
        ((" two three",), ["one"]),
        (("e two thr",), ["on"]),
        (("time", "thr"), ["one", " two "]),
        (("two", "o"), []),
        (("timeless",), ["one", " two ", "three ", "time"]),
        (("nowhere",), ["one", " two ", "three ", "time"]),
    ],
)
def test_a_stop_string_ends_the_text_wherever_its_tokens_begin(stop: tuple[str, ...], told: list[str]) -> None:
    story = Story([b"so: ", b"one", b" two ", b"three ", b"time"])
    pieces = list(story.tell("so: ", stop=stop))
    assert "".join(pieces) == "".join(told)
    assert not any(s in "".join(pieces) for s in stop)


def test_text_that_may_become_a_stop_string_waits() -> None:
    story = Story([b"a", b"x", b"EN", b"D?", b"y"])
    assert list(story.tell("a", stop=("END!",))) == ["x", "END?", "y"]


@pytest.fixture(scope="module")
def trained_run(small_recipe: Recipe, small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    trainer = Trainer(replace(small_recipe, loop=replace(small_recipe.loop, steps=1)), small_dataset, run)
    trainer.train(StopRequest())
    trainer.finish()
    return run


@pytest.mark.parametrize("quantize", ["int8", "int8-a8", "fp8"])
def test_a_trained_model_speaks_with_experts_of_8_bits(turnout, trained_run: Path, quantize: str) -> None:
    result = turnout("generate", str(trained_run), "--prompt", "a", "--quantize", quantize, "--max-new-tokens", "5")
    assert result.code == 0, result.err
    assert result.out.startswith("a")


def test_another_tokenizer_than_the_models_is_refused(turnout, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    file = run / "tokenizer.json"
    own = json.loads(file.read_text())
    vocab = own["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(own))
    result = turnout("generate", str(run), "--prompt", "a", "--max-new-tokens", "2")
    assert (result.code, result.out) == (1, "")
    assert "is not the tokenizer that the model was trained with" in " ".join(result.err.split())


def test_an_unknown_precision_is_refused_with_those_there_are(turnout, trained_run: Path) -> None:
    result = turnout("generate", str(trained_run), "--prompt", "a", "--quantize", "int4")
    assert result.code == 2
    assert "unknown --quantize 'int4'; available: int8, int8-a8, fp8; did you mean 'int8'?" in result.err


def test_a_prompt_that_is_too_long_does_not_end_the_conversation(
    turnout, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a router", "a router sends each token " * 50, "the experts"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts) + "\n"))
    result = turnout("chat", str(trained_run), "--max-new-tokens", "5", "--seed", "1", "--json")
    assert result.code == 0, result.err
    turns = json.loads(result.out.splitlines()[-1])["turns"]
    assert [turn["prompt"] for turn in turns] == prompts
    assert re.search(r"error: the prompt has \d+ tokens; the model takes max_seq_len=64", result.err)
    assert ["error" in turn for turn in turns] == [False, True, False]
    assert turns[1]["text"] == ""
    assert all(0 < turn["tokens"] <= 5 for turn in (turns[0], turns[2]))


@pytest.mark.parametrize("extreme", [("--temperature", "1e-50"), ("--top-p", "1e-50")])
def test_a_setting_near_its_end_gives_the_likeliest_tokens(
    turnout, trained_run: Path, extreme: tuple[str, str]
) -> None:
    asked = ("generate", str(trained_run), "--prompt", "a router", "--max-new-tokens", "8", "--json")
    best, near = turnout(*asked, "--temperature", "0"), turnout(*asked, *extreme)
    assert near.code == 0, near.err
    assert json.loads(near.out.splitlines()[-1])["text"] == json.loads(best.out.splitlines()[-1])["text"]


def test_what_a_terminal_cannot_show_is_escaped(turnout, trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", plain)
    result = turnout("generate", str(trained_run), "--prompt", "caf\u00e9 ", "--max-new-tokens", "3")
    assert result.code == 0, result.err
    plain.flush()
    assert plain.buffer.getvalue().startswith(b"caf\\xe9 ")  # type: ignore[attr-defined]


class Story:
    """A tokenizer, and a model that always tells the same tokens one after another."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eot_id = len(tokens)
        self.vocab_size = len(tokens) + 1
        self.model = _chain(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        return [self.tokens.index(text.encode())] if text else []

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def tell(self, prompt: str, **fields: Any) -> Iterator[str]:
        return generate(self.model, self, prompt, replace(GREEDY, **fields))


def _chain(vocab_size: int) -> Decoder:
    """After token t comes t + 1, after the last the first: blocks that add nothing between one-hot vectors."""
    model = Decoder(
        ModelConfig(
            vocab_size=vocab_size,
            dim=vocab_size,
            num_layers=1,
            max_seq_len=LONGEST,
            attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2),
            tie_embeddings=False,
        )
    )
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embedding_VD.copy_(torch.eye(vocab_size))
        model.head.copy_(torch.eye(vocab_size).roll(1, dims=0))
    return model


def _model(attention: AttentionKind = KINDS["gqa"], router: RouterConfig = ROUTERS["topk"]) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=2,
        max_seq_len=LONGEST,
        attention=attention,
        moe=MoEConfig(num_experts=4, hidden=16, router=router, losses=()),
        init_std=0.3,
    )
    return Decoder(config)
