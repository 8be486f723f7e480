"""`turnout verify` on other libraries' layers: what each is known not to keep, and one sentence where it is absent."""

import sys
from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional as F

from benchmarks.verify_layers import absent
from turnout.errors import ConfigError
from turnout.verify import CHECKS, Layer, NotApplicable, Sizes, verify
from turnout.verify.cases import distance, draw
from turnout.verify.targets import PEERS, peer_targets, subject

SIZES = Sizes(dim=16, hidden=8, num_experts=4)

# the laws a layer does not keep, and why
NOT_KEPT: Mapping[str, dict[str, str]] = {
    "deepspeed:top1": {"A2": "padding stays in the mean of the scores"},
    "deepspeed:top2": {},
    "deepspeed:topk": {"R3": "torch.topk"},
    "torchtitan:moe": {
        "G2": "bfloat16 experts",
        "G9": "bfloat16 experts",
        "R3": "torch.topk",
        "S2": "counts tokens in a buffer",
    },
    "st_moe_pytorch:moe": {
        "G1": "straight-through dispatch",
        "G2": "straight-through dispatch",
        "G6": "its gate pads an empty sequence by -1",
        "O3": "its masks are float32",
        "O4": "its gate pads an empty sequence by -1",
        "R3": "torch.topk",
    },
}
# laws that hang on the machine: float32 products of more rows round otherwise only where the matrix library takes
# another kernel for them
EITHER_WAY: Mapping[str, set[str]] = {"deepspeed:top1": {"P1", "P2"}}


def test_every_peer_is_tried() -> None:
    assert set(NOT_KEPT) == set(peer_targets())


def installed(target: str) -> Layer:
    pytest.importorskip(target.partition(":")[0], reason="not installed: make peers")
    return subject(target).layer(SIZES, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("target", NOT_KEPT)
def test_a_peer_keeps_all_laws_but_those_known_and_not_those(target: str) -> None:
    """An exception would count as a failure: none but those said."""
    installed(target)
    results = {r.id: r for r in verify(subject(target))}
    assert set(results) == set(CHECKS.names())
    failed = {id: r.case for id, r in results.items() if r.outcome == "fail"}
    assert set(failed) - EITHER_WAY.get(target, set()) == set(NOT_KEPT[target]), failed


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("target", NOT_KEPT)
def test_the_settings_drop_nothing(target: str) -> None:
    """As many choices as asked for, of every token, also where all want the same experts."""
    layer = installed(target)
    k = {"deepspeed:top1": 1, "deepspeed:topk": 3}.get(target, 2)
    for training in (False, True):
        layer.module.train(training)
        for x in (draw(layer, 33), draw(layer, 1).expand(1, 33, layer.dim)):
            assert ((layer.gates(x[0]) != 0).sum(dim=1) == k).all()


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_torchtitan_s_experts_are_swiglu_in_bfloat16() -> None:
    layer = installed("torchtitan:moe")
    w1_EFD, w2_EDF, w3_EFD = layer.expert_parameters().values()
    x_TD = draw(layer, 9)[0]
    for e, expert in enumerate(layer.experts()):
        want = (F.silu(x_TD @ w1_EFD[e].T) * (x_TD @ w3_EFD[e].T)) @ w2_EDF[e].T
        assert 2**-12 < distance(expert(x_TD), want) < 2**-5


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_reading_torchtitan_s_counts_leaves_them_as_they_were() -> None:
    layer = installed("torchtitan:moe")
    first, again = layer.counts(draw(layer, 9)), layer.counts(draw(layer, 9))
    assert torch.equal(first, again)
    assert not layer.module.get_buffer("tokens_per_expert_E").any()
    assert not layer.module.training


def test_deepspeed_s_mask_reaches_the_gate_for_one_choice_alone() -> None:
    mask = torch.arange(9).unsqueeze(0) < 4
    top1, top2 = installed("deepspeed:top1"), installed("deepspeed:top2")
    assert int(top1.counts(draw(top1, 9), mask).sum()) == 4
    with pytest.raises(NotApplicable, match="used_token for k=1 alone"):
        top2.forward(draw(top2, 9), mask)


INSTALL = {"deepspeed": "deepspeed", "torchtitan": "torchtitan triton", "st_moe_pytorch": "st-moe-pytorch"}


@pytest.mark.parametrize("target", NOT_KEPT)
def test_a_library_that_is_absent_is_said_in_one_sentence(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = target.partition(":")[0]
    hide(library, monkeypatch)
    with pytest.raises(ConfigError, match=rf"{library} cannot be imported \(.*\): pip install {INSTALL[library]}$"):
        subject(target)
    assert f"pip install {INSTALL[library]}" in absent(target)


def hide(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had never been installed."""
    for name in [n for n in sys.modules if n == library or n.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize("library", PEERS)
def test_an_unknown_layer_of_a_peer_names_those_there_are(library: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown {library} layer 'top9'; available: {PEERS[library][1][0]}"):
        subject(f"{library}:top9")
