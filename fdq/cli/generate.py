"""`fdq generate`: text from a checkpoint, as it is decoded."""

import contextlib
import sys
import time
from typing import Annotated

import typer

from fdq.cli import console

NAME = "generate"
EXAMPLE = "Example:  fdq generate ernie-w4a16c8 --prompt 'def main(' --max-new-tokens 64"


@console.command
def run(
    directory: console.Directory,
    prompt: console.Prompt = "-",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(hidden=True)] = None,
    scheme: console.LoadScheme = None,
    cache: console.Cache = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in the cache. Default: as many as needed.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest tokens that together have p.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only tokens at least p times as likely as the best.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random choices.")] = 0,
    dtype: console.Dtype = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Continues a prompt; the text appears as it is decoded."""
    import jax

    from fdq.analysis.startup_time import measured
    from fdq.decoding.generation import generate
    from fdq.decoding.sampling import Sampling
    from fdq.storage import load

    if max_tokens is not None:
        raise ValueError(f"--max-tokens is called --max-new-tokens: --max-new-tokens {max_tokens}.")
    console.decoder_directory(directory)
    sampling = None
    if temperature > 0:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    elif (top_k, top_p, min_p) != (None, None, None):
        raise ValueError(
            "--top-k, --top-p and --min-p choose among random draws: add --temperature 1."
        )
    recipe = console.loading_scheme(scheme)
    with console.progress("Loading", quiet=json, in_bytes=True) as update:
        model = load(directory, scheme=recipe, dtype=dtype, progress=update)
    if model.tokenizer_path is None:
        what = "no tokenizer that fdq reads" if directory.is_file() else "no tokenizer.json"
        raise ValueError(
            f"{directory}: {what}, which a prompt needs. Put that of the original model into the "
            "directory of a model in safetensors or of fdq's."
        )
    console.check_cache(cache, model)
    pieces: list[str] = []
    first_token = None
    start = time.perf_counter()
    with contextlib.ExitStack() as waiting, measured() as spent:
        if not json:
            waiting.enter_context(console.err.status("Compiling ..."))

        def show(index: int, piece: str) -> None:
            nonlocal first_token
            waiting.close()
            if first_token is None:
                first_token = time.perf_counter() - start
            if not json:
                sys.stdout.write(piece if pieces else prompt + piece)
                sys.stdout.flush()
            pieces.append(piece)

        generate(
            model,
            [prompt],
            max_new_tokens,
            sampling=sampling,
            key=jax.random.key(seed),
            cache=cache,
            max_length=context,
            stream=show,
            stream_steps=16,
        )
    seconds = time.perf_counter() - start
    if json:
        text = "".join(pieces)
        times = {
            "seconds": seconds,
            "first_token_seconds": first_token,
            "lowering_seconds": spent.lowering,
            "compiling_seconds": spent.compiling,
            "self_check_seconds": spent.self_check,
        }
        console.print_json({"prompt": prompt, "text": text} | times)
        return
    sys.stdout.write("\n" if pieces else f"{prompt}\n")
    sys.stdout.flush()
    if first_token is not None:
        parts = f"lowering {spent.lowering:.1f} s, compiling {spent.compiling:.1f} s"
        if spent.self_check:
            parts += f", self-checks of kernels {spent.self_check:.1f} s"
        console.err.print(f"First text after {first_token:.1f} s ({parts}); all {seconds:.1f} s.")
