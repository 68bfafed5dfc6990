"""`fdq schemes`: what scheme names are made of."""

from fdq.cli import console

NAME = "schemes"
EXAMPLE = "Example:  fdq schemes --json"


@console.command
def run(json: console.Json = False, debug: console.Debug = False) -> None:
    """Types of weights, activations and caches, and names that stand for a whole scheme."""
    from fdq.schemes.listing import listing

    known = listing()
    if json:
        console.print_json(known.to_dict())
        return
    console.out.print("W<type>A<type>C<type>, such as W4A16C8; a part that is left out is 16 bits.")
    parts = [(part, ", ".join(types)) for part, types in known.types.items()]
    for title, rows in (
        ("types", parts),
        ("suffixes, as in W4A16-g64", list(known.suffixes.items())),
        ("names of whole schemes", list(known.names.items())),
    ):
        console.out.print(console.table(title, ["", "meaning"], rows, left=True))
