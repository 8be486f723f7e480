"""The caching allocator over sizes: laws that hold for any sequence of tensors, and PyTorch's own rules of size."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from turnout.plan.allocator import MIB, Block, CachingAllocator


@given(
    sizes=st.lists(st.integers(1, 200 * MIB), min_size=1, max_size=40),
    drops=st.lists(st.integers(0, 39), max_size=40),
    late=st.integers(0, 5),
)
def test_what_is_held_covers_what_lives_and_never_shrinks(sizes: list[int], drops: list[int], late: int) -> None:
    memory = CachingAllocator()
    blocks: dict[int, Block] = {}
    held, asked = 0, 0
    for i, size in enumerate(sizes):
        blocks[i] = memory.make(size)
        asked += blocks[i].size
        assert memory.reserved >= max(held, memory.live)
        held = memory.reserved
        if i < len(drops) and drops[i] in blocks:
            memory.drop_late(blocks.pop(drops[i]), late)
        memory.launch(1)
    memory.wait()
    assert memory.live == sum(block.size for block in blocks.values())
    memory.drop(*blocks.values())
    assert memory.live == 0
    assert memory.reserved == held <= asked + len(sizes) * 20 * MIB


@given(sizes=st.lists(st.integers(1, MIB), min_size=1, max_size=60), kept=st.integers(1, 7))
def test_small_tensors_share_pieces_of_2_mib_of_their_own(sizes: list[int], kept: int) -> None:
    memory = CachingAllocator()
    blocks = [memory.make(size) for size in sizes]
    assert memory.reserved % (2 * MIB) == 0
    assert all(block.size == -(-size // 512) * 512 for block, size in zip(blocks, sizes, strict=True))
    held = memory.reserved
    memory.drop(*blocks[kept:])
    memory.make(3 * MIB)  # not from them, however much is free
    assert memory.reserved == held + 20 * MIB


@given(sizes=st.lists(st.integers(10 * MIB, 200 * MIB), min_size=1, max_size=20), order=st.randoms())
def test_the_same_tensors_again_ask_for_nothing(sizes: list[int], order: Random) -> None:
    memory = CachingAllocator()
    blocks = [memory.make(size) for size in sizes]
    held = memory.reserved
    order.shuffle(blocks)
    memory.drop(*blocks)
    # the largest first, for a small one would be cut from a piece that a large one needs
    for size in sorted(sizes, reverse=True):
        memory.make(size)
    assert memory.reserved == held


def test_sizes_are_asked_for_as_pytorch_does() -> None:
    memory = CachingAllocator()
    memory.make(11 * MIB)
    assert memory.reserved == 12 * MIB
    memory.make(3 * MIB)
    assert memory.reserved == 32 * MIB
    memory.make(16 * MIB)  # what is left of the 20 MiB
    assert memory.reserved == 32 * MIB


def test_a_tensor_that_another_stream_reads_is_free_only_later() -> None:
    memory = CachingAllocator()
    memory.drop_late(memory.make(64 * MIB), 2)
    memory.launch(1)
    memory.make(64 * MIB)
    assert memory.reserved == 128 * MIB
    memory.launch(1)
    memory.make(64 * MIB)
    assert memory.reserved == 128 * MIB
    memory.drop_late(memory.make(64 * MIB), 9)
    memory.wait()
    memory.make(64 * MIB)
    assert memory.reserved == 192 * MIB


def test_before_the_device_is_full_late_tensors_are_waited_for() -> None:
    memory = CachingAllocator(device_bytes=200 * MIB)
    for _ in range(9):
        memory.drop_late(memory.make(64 * MIB), 1024)
    assert memory.reserved == memory.peak_reserved == 192 * MIB


def test_before_the_device_is_full_free_pieces_are_given_back() -> None:
    memory = CachingAllocator(device_bytes=200 * MIB)
    small, large, cut = memory.make(1 * MIB), memory.make(100 * MIB), memory.make(60 * MIB)
    memory.drop(small, large, cut)
    memory.make(20 * MIB)  # of the 60
    memory.make(120 * MIB)
    assert memory.reserved == (60 + 120) * MIB
    assert memory.peak_reserved == 180 * MIB
    memory.make(90 * MIB)  # what lives is not refused: whether a job fits is another's question
    assert memory.peak_reserved == 270 * MIB
