"""Fine-tune low-rank adapters beside 2-bit weights, and plot what the held-out text says.

    python examples/qlora.py                              # fifteen minutes on two busy cores
    python examples/qlora.py --steps 20 --out /tmp/trial  # a quick trial
    python examples/qlora.py --loss text                  # learn from text, not from the original
    python examples/qlora.py --draw docs/qlora.json       # only draws figures that are there

With weights of 2 bits the shipped model needs a fifth more bits for a byte of text. The weights
stay as they are; adapters beside them learn to say what the original says: the loss is the
divergence of the next token's distribution from the original's (distillation), or plain
cross-entropy. Text is Python's own standard library, of which 1 file in 20 is held out.

Needs `pip install 'fdq-jax[cli,train]'`. Writes OUT.json, OUT.svg and the adapters in PEFT's
format, OUT-adapters.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fdq
from fdq.analysis import chart, sample_text
from fdq.analysis.shipped_model import shipped_model_path
from fdq.decoding.tokenizer import Tokenizer

TRAINING_BYTES = 2_000_000  # of the training text, from anywhere in it


def windows(tokens: np.ndarray, batch: int, length: int, seed: int) -> Iterator[jax.Array]:
    """Endless random `[batch, length + 1]` pieces of a text."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(tokens) - length - 1, size=batch)
        yield jnp.asarray(np.stack([tokens[s : s + length + 1] for s in starts]))


def text_loss(model: nnx.Module, tokens: jax.Array, _: jax.Array) -> jax.Array:
    """Nats per token of `tokens [B, L + 1]`."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def distillation_loss(model: nnx.Module, tokens: jax.Array, original: jax.Array) -> jax.Array:
    """Mean KL in nats of the model's next token from that of `original [B, L, V]`, logits."""
    ours = jax.nn.log_softmax(model(tokens[:, :-1]))
    theirs = jax.nn.log_softmax(original)
    return (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()


LOSSES = {"distill": distillation_loss, "text": text_loss}


def make_step(loss_of):
    """`step(model, optimizer, teacher, tokens) -> loss`, compiled; moves the adapters in place."""

    @nnx.jit
    def step(model, optimizer, teacher, tokens):
        original = teacher(tokens[:, :-1]) if loss_of is distillation_loss else None
        of_adapters = nnx.DiffState(0, nnx.LoRAParam)
        loss, gradient = nnx.value_and_grad(loss_of, argnums=of_adapters)(model, tokens, original)
        optimizer.update(model, gradient)
        return loss

    return step


def train(options: argparse.Namespace) -> tuple[dict, nnx.Module]:
    """The figures of a run, and the model with its adapters."""
    source = shipped_model_path()
    tokenizer = Tokenizer.load(source)
    heldout = sample_text.heldout_text(max_bytes=options.heldout_bytes).text
    heldout_tokens = tokenizer.encode(heldout, bos=True)
    text = sample_text.training_text().text
    rng = np.random.default_rng(options.seed)
    pieces = rng.integers(len(text) - 4000, size=TRAINING_BYTES // 4000)
    tokens = np.asarray(
        [token for at in pieces for token in tokenizer.encode(text[at : at + 4000])], np.int32
    )

    original = fdq.load(source, dtype="float32")
    base = fdq.quantize(original, options.scheme)
    model = fdq.lora(base, rank=options.rank, alpha=2 * options.rank, targets=options.targets)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))

    def measured(model: nnx.Module) -> float:
        report = fdq.evaluate(model, heldout_tokens, text_bytes=len(heldout.encode()))
        return report.bits_per_byte

    curve, losses = [(0, measured(model))], []
    result = {
        "scheme": options.scheme,
        "rank": options.rank,
        "loss": options.loss,
        "batch": options.batch,
        "length": options.length,
        "adapter_parameters": count,
        "original_bits_per_byte": measured(original),
        "quantized_bits_per_byte": curve[0][1],
    }
    print(json.dumps(result, indent=2))
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.steps)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.LoRAParam)
    step = make_step(LOSSES[options.loss])
    pieces = windows(tokens, options.batch, options.length, options.seed)
    start = time.perf_counter()
    for index in range(1, options.steps + 1):
        losses.append(float(step(model, optimizer, original, next(pieces))))
        if index % options.every == 0 or index == options.steps:
            curve.append((index, measured(model)))
            seconds = time.perf_counter() - start
            print(f"step {index}: loss {np.mean(losses[-options.every :]):.4f}, held-out bits per "
                  f"byte {curve[-1][1]:.4f}, {seconds:.0f} s")  # fmt: skip
    result |= {
        "steps": options.steps,
        "tuned_bits_per_byte": curve[-1][1],
        "merged_bits_per_byte": measured(fdq.merge_lora(model)),
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
        "losses": losses,
    }
    return result, model


def drawing(result: dict) -> str:
    """The curve between the original and the quantized model, as SVG."""
    last, tuned = result["curve"][-1]
    before, best = result["quantized_bits_per_byte"], result["original_bits_per_byte"]
    return chart.lines(
        {
            f"with adapters of rank {result['rank']}: {tuned:.3f}": result["curve"],
            f"{result['scheme']}, as it was quantized: {before:.3f}": [(0, before), (last, before)],
            f"the original, 16 bits: {best:.3f}": [(0, best), (last, best)],
        },
        x=f"steps of {result['batch']} x {result['length']} tokens",
        y="held-out bits per byte",
        from_zero=False,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", default="W2A16")
    parser.add_argument("--loss", choices=LOSSES, default="distill")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="*", help="names of layers; all linear ones by default")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=20, help="steps between looks at the text")
    parser.add_argument("--heldout-bytes", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("qlora"))
    parser.add_argument("--draw", type=pathlib.Path, help="figures of a run: draws them anew")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    if options.draw:
        result = json.loads(options.draw.read_text("utf-8"))
        options.draw.with_suffix(".svg").write_text(drawing(result), "utf-8")
        return result
    result, model = train(options)
    name = str(options.out)
    pathlib.Path(f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    pathlib.Path(f"{name}.svg").write_text(drawing(result), "utf-8")
    fdq.save_lora(model, f"{name}-adapters", base="tiny_ernie", overwrite=True)
    print(f"wrote {name}.json, {name}.svg and {name}-adapters")
    return result


if __name__ == "__main__":
    main()
