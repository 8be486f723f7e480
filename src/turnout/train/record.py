"""What a run writes down beside its checkpoints: the folder's recipe and tokenizer, the record, the token view."""

from pathlib import Path

import torch
from torch import Tensor

from turnout.comm import World
from turnout.config import dump_toml
from turnout.data.prepare import Dataset
from turnout.data.sampler import Batch
from turnout.models import Decoder
from turnout.observe.recorder import Recorder
from turnout.observe.silent import SilentRecorder
from turnout.observe.token_view import token_choices
from turnout.parallel import Parallel, of_stages
from turnout.train.durable import replace_text
from turnout.train.recipe import Recipe
from turnout.train.recipes import recipe_of


def open_record(
    run: Path, recipe: Recipe, dataset: Dataset, world: World, *, resumed_at: int | None, begins: bool
) -> Recorder | SilentRecorder:
    """The record of a run, which the first rank writes and the others only tally.

    `resumed_at`: the step a resumed run goes on from, None for a new one; `begins`: no checkpoint was taken up.
    """
    moe, layers = recipe.model.moe, recipe.model.moe_layers()
    names, counts = [f"blocks.{layer}" for layer in layers], [moe.num_experts if moe else 0] * len(layers)
    if not world.is_first:
        return SilentRecorder(names, counts)
    sinks = recipe.loop.sinks
    # before the record: a folder that has one can be resumed, whenever its run was killed
    if resumed_at is None or recipe_of(run) != recipe:
        replace_text(run / "recipe.toml", dump_toml(recipe))
    if begins:
        dataset.tokenizer.save(run / "tokenizer.json")
    if resumed_at is not None:
        return Recorder.resume(run, resumed_at, names, counts, sinks=sinks)
    return Recorder(run, names, counts, sinks=sinks)


def record_token_view(
    recorder: Recorder | SilentRecorder,
    recipe: Recipe,
    dataset: Dataset,
    model: Decoder,
    *,
    parallel: Parallel,
    step: int,
) -> None:
    """The way of the recipe's probe text through the experts, if the model has any. Every rank calls it."""
    if not recorder.header.layers:
        return
    tokenizer = dataset.tokenizer
    ids = tokenizer.encode(recipe.loop.probe)[: recipe.model.max_seq_len]
    model.eval()
    with torch.no_grad():
        choices = _choices(model, torch.tensor([ids], device=next(model.parameters()).device), parallel)
    model.train()
    if parallel.strategy.sequence_parallel:
        # of one sequence each of these ranks has a piece
        of_layers = zip(*parallel.world.all(choices)[: parallel.strategy.tp], strict=True)
        choices = [tuple([token for part in parts for token in part[of]] for of in (0, 1)) for parts in of_layers]
    pieces = [tokenizer.decode([token]) for token in ids]
    recorder.token_view(step, pieces, [e for e, _ in choices], [w for _, w in choices])


Choices = tuple[list[list[int]], list[list[float]]]


def _choices(model: Decoder, tokens_BS: Tensor, parallel: Parallel) -> list[Choices]:
    """The experts and weights of every token, for every layer that has experts, wherever it lies."""
    if parallel.stages is None:
        return [token_choices(assignment) for assignment in model(tokens_BS).assignments]
    batch = Batch(tokens_BS=tokens_BS, targets_BS=tokens_BS)
    (passed,) = parallel.stages.forward([batch], torch.autocast(tokens_BS.device.type, enabled=False))
    own = {layer: token_choices(assignment) for layer, assignment in passed.assignments.items()}
    together = {layer: each for of_stage in of_stages(own, parallel.groups.stages) for layer, each in of_stage.items()}
    return [together[layer] for layer in sorted(together)]
