"""Pictures and pages of answers, and traffic by link: they show what was computed, and need nothing else."""

import re
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Turnout
from tests.plan.test_properties import JOBS
from turnout.alltoall import PROGRAMS, RoutedTokens, RowSize, pairs_of, round_trip, traffic_of
from turnout.plan.answer_page import Grid, render
from turnout.plan.collectives import all_gather, all_to_all, collective
from turnout.plan.figures import BLUE, ORANGE, Bar, Bars, Point, Points
from turnout.plan.job import Job
from turnout.plan.links import ACROSS, INSIDE, RAIL, links_of
from turnout.plan.step import step_of
from turnout.plan.svg import svg_of, ticks
from turnout.plan.volume import volume
from turnout.topology import Mesh

LAYOUT = ("mixtral-8x7b", "--nodes", "4", "--batch", "256", "--layout", "tp=2,pp=4,ep=4")
VERBS = {
    "time": (*LAYOUT, "--what-if"),
    "volume": (*LAYOUT, "--links"),
    "memory": LAYOUT,
    "search": ("mixtral-8x7b", "--batch", "64", "--seq", "2048", "--try-nodes", "2,4", "--usd-per-device-hour", "2"),
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def plan(turnout: Turnout) -> Turnout:
    return partial(turnout, "plan")


# --- links ---


@settings(max_examples=100, deadline=None)
@given(job=JOBS)
def test_the_sum_over_links_is_the_total_of_every_collective(job: Job) -> None:
    parts = volume(step_of(job, 8))
    links = links_of(parts, tensor=job.strategy.tp if job.strategy.alltoall == "coordinated" else 1)
    sizes, messages = Counter(), Counter()
    for each in links:
        assert each.peers > 0
        sizes[each.collective] += each.peers * each.link_bytes
        messages[each.collective] += each.peers * each.messages
    for part in parts:
        assert sizes[part.name] == pytest.approx(sum(p.total_bytes for p in parts if p.name == part.name), rel=1e-8)
        assert messages[part.name] == pytest.approx(sum(p.messages for p in parts if p.name == part.name), rel=1e-8)
        kinds = {each.link for each in links if each.collective == part.name}
        assert (INSIDE in kinds) == (part.intra_bytes > 0)
        assert bool(kinds & {RAIL, ACROSS}) == (part.inter_bytes > 0)


@pytest.mark.parametrize("name", ["flat", "hierarchical", "node_dedup", "rank_dedup"])
@pytest.mark.parametrize(
    "mesh", [Mesh(nodes=1, local=4), Mesh(nodes=4), Mesh(nodes=2, local=3), Mesh(nodes=3, local=2)]
)
def test_bytes_to_each_device_are_those_of_tokens_that_go_everywhere(name: str, mesh: Mesh) -> None:
    """Every rank routes a token to every rank, so that all pairs of a kind are alike: each link is seen by itself."""
    routing = RoutedTokens(mesh, [[list(range(mesh.size))] for _ in range(mesh.size)])
    size, moves = RowSize(row_bytes=4.0, back_bytes=4.0), round_trip(PROGRAMS[name], mesh)
    by_pair = pairs_of(moves, routing, size)
    found: dict[str, set[float]] = defaultdict(set)
    for (sender, receiver), (sent, _) in by_pair.items():
        (node, place), (other, there) = mesh.place(sender), mesh.place(receiver)
        kind = INSIDE if node == other else (RAIL if place == there else ACROSS)
        if sent:
            found[kind].add(sent)
    links = links_of([collective("ep all-to-all", "ep", mesh, traffic_of(moves, routing, size))])
    assert {each.link: {each.link_bytes} for each in links} == dict(found)
    for each in links:
        pairs = [pair for pair, (sent, _) in by_pair.items() if sent == each.link_bytes and pair[0] == 0]
        assert len(pairs) >= each.peers


def test_a_ring_goes_on_to_one_device_and_an_exchange_to_all() -> None:
    mesh = Mesh(nodes=2, local=4)
    ring, exchange = (links_of([collective("x", axis, mesh, make(mesh, 80.0))]) for axis, make in
                      (("dp", all_gather), ("ep", all_to_all)))  # fmt: skip
    assert [(each.link, each.peers, each.link_bytes) for each in ring] == [(INSIDE, 0.75, 70.0), (RAIL, 0.25, 70.0)]
    assert [(each.link, each.peers, each.link_bytes) for each in exchange] == [
        (INSIDE, 3, 10.0), (RAIL, 1, 10.0), (ACROSS, 3, 10.0),
    ]  # fmt: skip


# --- pictures ---


@given(longest=st.floats(1e-9, 1e15))
def test_ticks_are_round_and_few(longest: float) -> None:
    found = ticks(longest)
    assert found[0] == 0
    assert found[-1] <= longest * (1 + 1e-6)
    assert 3 <= len(found) <= 7
    assert all(re.fullmatch(r"[125]", f"{b - a:.6e}"[0]) for a, b in pairwise(found))


def test_bars_are_as_long_as_their_values() -> None:
    rows = (Bar(label="a<b", values=(1.0, 3.0), note="4"), Bar(label="c", values=(0.0, 2.0), note="2", start=1.0))
    figure = Bars(
        title="T", unit="GB", series=("x", "y"), colours=(BLUE, ORANGE), rows=rows, limit=8.0, limit_name="all"
    )
    legend, _, drawn = svg_of(figure).partition("</p>")
    assert legend.count("<i ") == 2
    boxes = [(float(box.get("x", 0)), float(box.get("width", 0)), box.get("fill")) for box in
             ElementTree.fromstring(drawn).iter(f"{SVG}rect")]  # fmt: skip
    (left, one, _), (_, three, _), (moved, two, colour) = boxes
    assert (three / one, two / one) == (pytest.approx(3.0, rel=0.01), pytest.approx(2.0, rel=0.01))
    assert moved == pytest.approx(left + one, abs=0.1)
    assert colour == ORANGE
    (line,) = [each for each in ElementTree.fromstring(drawn).iter(f"{SVG}line") if each.get("class") == "limit"]
    assert float(line.get("x1", 0)) == pytest.approx(left + 8 * one, abs=0.5)


def test_points_lie_where_they_should() -> None:
    points = tuple(Point(x=x, y=y, label=f"{x}", group=str(x > 1), mark="A" * (x == 1)) for x, y in ((1, 4), (2, 1)))
    drawn = svg_of(Points(title="T", x="GiB", y="s", rows=points, notes=("A  first: <1>",)))
    assert "A  first: &lt;1&gt;" in drawn
    circles = list(ElementTree.fromstring(re.findall(r"<svg.*</svg>", drawn)[0]).iter(f"{SVG}circle"))
    (x1, y1), (x2, y2) = [(float(c.get("cx", 0)) - 64, 420 - float(c.get("cy", 0))) for c in circles]
    assert (x2 / x1, y1 / y2) == (pytest.approx(2.0, rel=0.01), pytest.approx(4.0, rel=0.01))
    assert circles[0].get("fill") != circles[1].get("fill")


def test_a_page_shows_words_as_they_are() -> None:
    grid = Grid(title="<b>", headings=(("a&b", "left"), ("n", "right")), rows=(("<script>", "1"),))
    layout = Grid(title="", headings=(("layout", "left"),), rows=(("tp=1,pp=2",), ("a, b",)))
    page = render("T<", "lead {{body}}", (), (grid, "line > 1", layout))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "lead {{body}}" in page
    assert page.count("<td") == 4
    # a long layout goes on in the next line of a narrow screen
    assert '<td class="left">tp=1,<wbr>pp=2</td>' in page
    assert "a, b" in page


def test_pictures_keep_the_size_of_their_words_on_a_narrow_screen() -> None:
    figure = Bars(title="T", unit="s", series=("x",), colours=(BLUE,), rows=(Bar(label="tp", values=(1.0,), note=""),))
    page = render("T", "", (figure,), ())
    (rules,) = re.findall(r"@media \(max-width: 700px\) \{(.*?)\n\}", page, re.DOTALL)
    assert re.search(r"\.drawing \{ overflow-x: auto; \}\s*\.drawing svg \{ width: \d+px; \}", rules)
    assert '<div class="drawing"><svg' in page
    # short labels take little of the picture
    (box,) = re.findall(r"<rect x=\"([\d.]+)\"", page)
    assert float(box) < 40


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_draws_and_writes_what_it_answers(verb: str, plan: Turnout, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, page = tmp_path / "plot.png", tmp_path / "page.html"
    result = plan(verb, *VERBS[verb], "--plot", str(plot), "--html", str(page), "--json")
    assert result.code == 0, result.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    # nothing is fetched and nothing runs
    assert re.findall(r"https?://\S*?(?=[\"' <])", text) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in text
    assert "src=" not in text
    # what the figure draws is not drawn again from characters
    assert "█" not in text
    (drawn,) = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    ElementTree.fromstring(drawn)
    # every line the terminal shows is in the page, but for what was written where
    words = " ".join(
        re.sub(r"<[^>]*>", " ", text.replace("<wbr>", "")).replace("&#x27;", "'").replace("&lt;", "<").split()
    )
    for line in result.err.splitlines():
        first = re.split(r"\s{2,}", line.strip())[0]
        assert first in words or line.strip().startswith("wrote"), line
    for wrong in ("plot.doc", "plot"):
        assert plan(verb, *VERBS[verb], "--plot", str(tmp_path / wrong)).code == 2


def test_links_of_a_volume_are_shown_and_answered(plan: Turnout) -> None:
    args = ("volume", "deepseek-v3", "--cluster", "h800", "--nodes", "8", "--batch", "64", "--layout", "ep=64,zero=3")
    answer = plan(*args, "--json").last
    total = sum(row["peers"] * row["link_bytes"] for row in answer["links"])
    assert total == pytest.approx(answer["intra_bytes"] + answer["inter_bytes"], rel=1e-9)
    assert {row["link"] for row in answer["links"]} == {INSIDE, RAIL, ACROSS}
    assert ACROSS in plan(*args, "--links").out
    assert ACROSS not in plan(*args).out
