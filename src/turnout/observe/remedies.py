"""What to try against each trouble of experts and router: only what the run's router can be moved by."""

from dataclasses import dataclass

from turnout.observe.routing import Routing

# a run goes on with its own recipe alone, so what is changed is changed for a new one
_GOOD = "The update of such a step is not made: the last checkpoint still holds good weights."
_BATCH = "If it is always the same data, look at that batch."
_ROOM = "raise the capacity factor (1.25 to 2.0), or set the capacity policy to none, which drops nothing."
_FEWER = "If it stays so, fewer experts give the same model for less."


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """One text for each trouble that has to do with the router."""

    nonfinite: str
    spikes: str
    dead: str
    collapse: str
    skew: str
    drops: str
    undecided: str = ""


def remedies(routing: Routing) -> Remedies:
    """The texts for this router; for one that does not learn, without what only moves a router that does."""
    return _learned(routing) if routing.learns else _fixed(routing)


def setting_names(routing: Routing) -> str:
    """The router's settings by their names, as a recipe has them."""
    return ", ".join(name for name, _ in routing.settings)


def _learned(routing: Routing) -> Remedies:
    balance = f"In a new run, {_more_balance(routing)}."
    live = routing.balance_losses
    reaches = " Check that it reaches the total loss at all (the auxiliary losses below)." if live else ""
    scope = ' Load counted over the whole step (scope = "global") leaves single micro-batches free to be uneven.'
    return Remedies(
        nonfinite="Lower the learning rate, clip gradients lower (optimizer.clip), or add the router z-loss "
        f"(router_z). {_GOOD}",
        spikes="Clip gradients lower, warm up for longer, or lower the learning rate; the router z-loss keeps router "
        f"logits from running away. {_BATCH}",
        dead=f"{balance} Router noise (the router noisy_topk) lets idle experts be tried. {_FEWER}",
        collapse=f"{balance}{reaches} A smaller learning rate for the first steps lets experts grow apart first.",
        skew=balance + (scope if "load_balance" in live else ""),
        drops=f"{balance} Drops come from the busiest experts. Or {_ROOM}",
        undecided=f"{_less_balance(routing)}, or train for longer.",
    )


def _more_balance(routing: Routing) -> str:
    if routing.balance_losses:
        return f"raise the coefficient of the loss {' and '.join(routing.balance_losses)} 3 to 10 times"
    if routing.own_balance:
        names = setting_names(routing)
        own = f"this router balances by itself ({routing.own_balance}): change a setting of it"
        return f"{own}{f' ({names})' if names else ''}, or add the loss load_balance to model.moe.losses"
    return "add the loss load_balance to model.moe.losses"


def _less_balance(routing: Routing) -> str:
    if routing.balance_losses:
        return f"Lower the coefficient of the loss {' and '.join(routing.balance_losses)}"
    return "Let the router learn faster (optimizer.router_lr_scale)"


def _fixed(routing: Routing) -> Remedies:
    meanings = ", ".join(f"{name} ({text})" if text else name for name, text in routing.settings)
    settings = f", or a setting of the router: {meanings}" if meanings else ""
    load = (
        "This router does not learn: no loss and no learning rate moves its load. In a new run, change "
        f"model.moe.num_experts{settings}."
    )
    return Remedies(
        nonfinite=f"Lower the learning rate, or clip gradients lower (optimizer.clip). {_GOOD}",
        spikes=f"Clip gradients lower, warm up for longer, or lower the learning rate. {_BATCH}",
        dead=load,
        collapse=load,
        skew=load,
        drops=f"{_ROOM[0].upper()}{_ROOM[1:]} Drops come from the busiest experts. {load}",
    )
