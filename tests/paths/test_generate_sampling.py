"""Laws of sampling, and of the stream of text that comes from it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turnout.errors import NonFiniteError
from turnout.infer.sampling import draw, probabilities
from turnout.infer.text_stream import TextStream

# in steps of a half: either equal or plainly apart
logits = st.lists(st.integers(-60, 60).map(lambda n: n / 2), min_size=1, max_size=12).map(torch.tensor)
temperatures = st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0])
nuclei = st.sampled_from([0.01, 0.5, 0.9, 1.0])


@given(logits_V=logits, temperature=temperatures, top_k=st.integers(0, 14), top_p=nuclei)
def test_probabilities_sum_to_one_and_keep_the_order(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    share_V = probabilities(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
    assert share_V.sum().item() == pytest.approx(1, abs=1e-5)
    assert share_V.min() >= 0
    kept = share_V > 0
    assert kept.any()
    # whatever stays is at least as good as whatever goes, and better is no less likely
    assert logits_V[kept].min() >= max(logits_V[~kept].tolist(), default=-1e9)
    assert (share_V[kept][logits_V[kept].argsort()].diff() >= -1e-6).all()


@given(logits_V=logits, temperature=temperatures, top_k=st.integers(1, 14), top_p=nuclei)
def test_no_more_than_top_k_tokens_stay(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    share_V = probabilities(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
    assert (share_V > 0).sum() <= top_k


@given(logits_V=logits, top_p=nuclei)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(logits_V: Tensor, top_p: float) -> None:
    plain_V, cut_V = probabilities(logits_V.double()), probabilities(logits_V.double(), top_p=top_p)
    kept = cut_V > 0
    best_first = plain_V.sort(descending=True).values
    assert plain_V[kept].sum() >= top_p - 1e-12
    assert best_first[: int(kept.sum()) - 1].sum() < top_p + 1e-12
    torch.testing.assert_close(cut_V[kept], plain_V[kept] / plain_V[kept].sum())


@given(logits_V=logits)
def test_without_cuts_it_is_softmax_of_logits_over_temperature(logits_V: Tensor) -> None:
    torch.testing.assert_close(probabilities(logits_V, temperature=2.0), (logits_V / 2).softmax(dim=0))
    torch.testing.assert_close(probabilities(logits_V, top_k=99), logits_V.softmax(dim=0))


@given(logits_V=logits)
def test_temperature_zero_is_the_first_best_token(logits_V: Tensor) -> None:
    expected = torch.zeros(len(logits_V)).index_fill(0, logits_V.argmax(), 1)
    assert torch.equal(probabilities(logits_V, temperature=0.0, top_k=1, top_p=0.1), expected)


@given(logits_V=logits, pair=st.tuples(st.floats(0.05, 5), st.floats(0.05, 5)))
def test_a_higher_temperature_never_lowers_entropy(logits_V: Tensor, pair: tuple[float, float]) -> None:
    cold, hot = (torch.special.entr(probabilities(logits_V.double(), temperature=t)).sum() for t in sorted(pair))
    assert cold <= hot + 1e-9


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert probabilities(torch.tensor([1e30, 0.0, -1e30]), temperature=1e-6).tolist() == [1, 0, 0]


@given(logits_V=logits, dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_what_is_too_small_to_divide_by_or_to_reach_leaves_the_best(logits_V: Tensor, dtype: torch.dtype) -> None:
    given_V = logits_V.to(dtype)
    for cut in ({"temperature": 1e-50}, {"temperature": 5e-324}, {"top_p": 1e-50}, {"top_p": 5e-324}):
        share_V = probabilities(given_V, **cut)
        assert share_V.sum().item() == pytest.approx(1)
        assert given_V[share_V > 0].min() == given_V.max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_without_a_finite_best_are_refused(value: float) -> None:
    with pytest.raises(NonFiniteError, match=rf"largest of the model's logits is {value}"):
        probabilities(torch.full((4,), value))


def test_forbidden_tokens_are_allowed_and_never_drawn() -> None:
    share_V = probabilities(torch.tensor([0.0, -torch.inf, 0.0, -torch.inf]), top_p=0.99)
    generator = torch.Generator().manual_seed(0)
    assert {draw(share_V, generator) for _ in range(200)} == {0, 2}


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    share_V, generator = torch.tensor([0.1, 0.0, 0.6, 0.3]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(share_V, generator) for _ in range(4000)]).bincount(minlength=4) / 4000
    # four standard deviations
    assert (drawn - share_V).abs().max() < 4 * (0.25 / 4000) ** 0.5


texts = st.text(alphabet="ab\u00e9\u2603\U0001f600", max_size=20)
stops = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=3)


@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_a_stream_gives_the_text_before_the_first_stop_whatever_the_tokens(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    stream, given_out = TextStream(stop), ""
    for start, end in itertools.pairwise(edges):
        given_out += stream.push(data[start:end])
        # nothing is ever taken back
        assert _before_stop(text, stop).startswith(given_out)
    assert given_out + stream.finish() == _before_stop(text, stop)
    assert stream.stopped == any(s in text for s in stop)


def _before_stop(text: str, stop: list[str]) -> str:
    """Cut where a stop string is first complete."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if not ends:
        return text
    first_complete = min(ends)[0]
    return text[: min(text.find(s) for s in stop if s in text[:first_complete])]


def test_of_two_stops_the_first_to_be_complete_counts() -> None:
    assert TextStream(["b", "abb"]).push(b"abb") == "a"
    assert TextStream(["b", "ab"]).push(b"xab") == "x"


def test_bytes_that_are_no_text_become_the_replacement_character() -> None:
    assert TextStream().push(b"a\xffb") == "a\ufffdb"
