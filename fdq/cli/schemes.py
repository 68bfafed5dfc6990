"""`fdq schemes`: what scheme names are made of, and what they cost."""

from fdq.cli import console

NAME = "schemes"
EXAMPLE = "Example:  fdq schemes --json"


@console.command
def run(json: console.Json = False, debug: console.Debug = False) -> None:
    """Types of weights, activations and caches, names of whole schemes, and what they cost."""
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
    columns = ["scheme", "bits/weight", "of all", "bits/byte", "KL", "same top token", "cache"]
    cells = [
        (
            row["scheme"],
            "-"
            if row["quantized_bits_per_weight"] is None
            else f"{row['quantized_bits_per_weight']:.3f}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['kl_nats_per_token']:.5f}",
            f"{row['same_top_token']:.1%}",
            console.size(row["cache_bytes_per_token"]),
        )
        for row in known.measured
    ]
    console.out.print(console.table("measured on the model that comes with fdq", columns, cells))
    console.out.print(
        "bits/weight: of the quantized weights, and of all. KL: to the original, in nats per "
        "token. cache: per token. Larger models lose less; the order stays. Yours: fdq evaluate."
    )
