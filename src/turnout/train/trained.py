"""A trained model out of its run folder."""

from dataclasses import dataclass
from pathlib import Path

from turnout.data.tokenizer import Tokenizer
from turnout.models import Decoder
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


def load_trained(run: Path) -> Trained:
    """The latest good checkpoint of a run.

    Raises: ConfigError if the folder is no run; CheckpointError if it has no sound checkpoint.
    """
    recipe = recipe_of(run)
    loaded = checkpoint.load(run, names={"model"})
    model = Decoder(recipe.model)
    check_fits(model.state_dict(), loaded.files["model"])
    model.load_state_dict(loaded.files["model"])
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    return Trained(model=model.eval(), tokenizer=tokenizer, recipe=recipe, step=loaded.step, notes=loaded.notes)
