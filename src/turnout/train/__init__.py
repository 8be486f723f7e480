"""A path from recipe to run: recipe, step, loop; checkpoints, guards, comparison."""
