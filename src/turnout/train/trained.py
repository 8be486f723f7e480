"""A trained model out of its run folder."""

from dataclasses import dataclass
from pathlib import Path

from turnout.data.tokenizer import Tokenizer
from turnout.errors import CheckpointError, ConfigError
from turnout.experts import PRECISIONS, quantize_experts
from turnout.models import Decoder
from turnout.registry import nearest
from turnout.train import checkpoint
from turnout.train.checkpoint_fit import check_fits
from turnout.train.recipe import Recipe
from turnout.train.recipes import recipe_of


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Model in evaluation mode, its tokenizer, and where it came from."""

    model: Decoder
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    notes: tuple[str, ...]


def load_trained(run: Path, *, quantize: str = "") -> Trained:
    """The latest good checkpoint of a run; `quantize`: int8, int8-a8 or fp8, how its experts are rounded for inference.

    Raises: ConfigError if the folder is no run, or its model cannot be quantised so; CheckpointError if it has no sound
    checkpoint, or another tokenizer than it was trained with.
    """
    if quantize and quantize not in PRECISIONS:
        legal = list(PRECISIONS)
        raise ConfigError(f"unknown --quantize {quantize!r}; available: {', '.join(legal)}{nearest(quantize, legal)}")
    recipe, tokenizer = recipe_of(run), Tokenizer.load(run / "tokenizer.json")
    loaded = checkpoint.load(run, names={"model"})
    # a checkpoint from before that was kept in it does not say
    if loaded.meta.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"{run / 'tokenizer.json'} is not the tokenizer that the model was trained with: ids would mean other "
            "text; put back the run's own"
        )
    model = Decoder(recipe.model)
    check_fits(model.state_dict(), loaded.files["model"])
    model.load_state_dict(loaded.files["model"])
    if quantize:
        quantize_experts(model, precision=quantize)
    return Trained(model=model.eval(), tokenizer=tokenizer, recipe=recipe, step=loaded.step, notes=loaded.notes)
