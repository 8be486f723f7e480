"""What to try against each trouble of experts and router: only what the run's router can be moved by."""

from dataclasses import dataclass

from turnout.observe.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """One text for each trouble that has to do with the router."""

    nonfinite: str
    spikes: str
    dead: str
    collapse: str
    skew: str
    drops: str


_LEARNED = Remedies(
    nonfinite="Lower the learning rate, clip gradients at 1.0, add the router z-loss, keep the router in float32. "
    "Resume from the last checkpoint before the first of these steps.",
    spikes="Clip gradients lower, warm up for longer, or lower the learning rate; the router z-loss keeps router "
    "logits from running away. If it is always the same data, look at that batch.",
    dead="Raise the coefficient of the load-balance loss 3 to 10 times, or use a router with a balancing bias. "
    "In a new run, add router noise during warm-up. If it stays so, fewer experts give the same model for less.",
    collapse="Raise the coefficient of the load-balance loss, and check that it reaches the total loss at all (the "
    "auxiliary losses below). A smaller learning rate for the first steps lets experts grow apart first.",
    skew="Raise the load-balance coefficient, or count load over the global batch (scope global) so that "
    "single micro-batches may be uneven. For speed alone, place a copy of the hot expert on a second rank.",
    drops="Balance the load first: drops come from the busiest experts. Then raise the capacity factor "
    "(1.25 to 2.0), or set the capacity policy to none, which drops nothing.",
)


def remedies(routing: Routing) -> Remedies:
    """The texts for this router; for one that does not learn, without what only moves a router that does."""
    return _LEARNED if routing.learns else _fixed(routing)


def setting_names(routing: Routing) -> str:
    """The router's settings by their names, as a recipe has them."""
    return ", ".join(name for name, _ in routing.settings)


def _fixed(routing: Routing) -> Remedies:
    meanings = ", ".join(f"{name} ({text})" if text else name for name, text in routing.settings)
    settings = f", or a setting of the router: {meanings}" if meanings else ""
    load = (
        "This router does not learn: no loss and no learning rate moves its load. In a new run, change "
        f"model.moe.num_experts{settings}."
    )
    return Remedies(
        nonfinite="Lower the learning rate, or clip gradients at 1.0. "
        "Resume from the last checkpoint before the first of these steps.",
        spikes="Clip gradients lower, warm up for longer, or lower the learning rate. "
        "If it is always the same data, look at that batch.",
        dead=load,
        collapse=load,
        skew=f"{load} For speed alone, place a copy of the hot expert on a second rank.",
        drops="Raise the capacity factor (1.25 to 2.0), or set the capacity policy to none, which drops nothing. "
        f"Drops come from the busiest experts. {load}",
    )
