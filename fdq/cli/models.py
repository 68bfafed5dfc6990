"""`fdq models`: which models fdq knows."""

from fdq.cli import console

NAME = "models"
EXAMPLE = "Example:  fdq models"


@console.command
def run(json: console.Json = False, debug: console.Debug = False) -> None:
    """Families whose checkpoints load, and the configurations that `fdq plan` knows by name."""
    from fdq.analysis.planner import known_models
    from fdq.models import FAMILIES

    known = known_models()
    if json:
        console.print_json({"families": list(FAMILIES), "models": known})
        return
    console.out.print(f"Families (model_type in config.json): {', '.join(FAMILIES)}")
    rows = [
        (name, sizes["family"], f"{sizes['parameters'] / 1e9:.2f} billion", f"{sizes['layers']}",
         f"{sizes['max_position']:,}")
        for name, sizes in known.items()
    ]  # fmt: skip
    columns = ["model", "family", "parameters", "layers", "positions"]
    console.out.print(console.table("Known to fdq plan", columns, rows))
