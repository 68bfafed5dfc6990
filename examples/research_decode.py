"""Decoding of your own: beam search, speculation, constraints and scoring, each in its own jit.

    python examples/research_decode.py

`fdq.functional(model)` gives pure functions and the arrays that they take, as one pytree; a
`fdq.DecodeState` is a pytree with the operations that such loops need.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from fdq.decoding.tokenizer import Tokenizer


@functools.partial(jax.jit, static_argnames=("beams", "steps"))
def beam_search(fns, prompt, *, beams, steps):
    """The most likely continuations of one prompt [L]: tokens [beams, steps], scores [beams]."""
    length = prompt.shape[0] + steps
    state = fns.init(fns.params, prompt[None], length).repeat(beams)
    # All beams are the same at first: only one of them may be continued.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)

    def body(carry, _):
        state, scores = carry
        logits, state = fns.step(fns.params, state)
        every = scores[:, None] + jax.nn.log_softmax(logits)
        scores, best = jax.lax.top_k(every.reshape(-1), beams)
        beam, token = jnp.divmod(best, logits.shape[1])
        return (state.take(beam).push(token), scores), None

    (state, scores), _ = jax.lax.scan(body, (state, scores), None, length=steps)
    return state.tokens[:, prompt.shape[0] :], scores


@functools.partial(jax.jit, static_argnames="draft_length")
def speculate(target, drafter, state, drafted, *, draft_length):
    """One round: a small model drafts, the large one verifies; returns both states, accepted [B].

    The result is the large model's greedy continuation, whatever the small one drafts.
    """

    def draft(drafted, _):
        logits, drafted = drafter.step(drafter.params, drafted)
        token = logits.argmax(-1)
        return drafted.push(token), token

    known = state.length
    # One step more than is verified, so that its cache holds the last drafted token too.
    drafted, tokens = jax.lax.scan(draft, drafted, None, length=draft_length + 1)
    tokens = tokens.T
    logits, state = target.extend(target.params, tokens, state)
    own = logits.argmax(-1)
    agrees = (own == tokens)[:, :draft_length] & ~state.finished[:, None]
    accepted = jnp.cumprod(agrees, axis=1).sum(axis=1)
    following = jnp.take_along_axis(own, accepted[:, None], axis=1)[:, 0]
    state = state.rollback(known + accepted).push(following)
    return state, drafted.rollback(known + accepted).push(following), accepted


def no_token_twice(logits, state):
    """A logits processor: rules out every token that a sequence has already."""
    rows = jnp.arange(state.batch)[:, None]
    known = jnp.arange(state.capacity)[None] < state.length[:, None]
    counts = jnp.zeros(logits.shape, jnp.int32).at[rows, state.tokens].add(known.astype(jnp.int32))
    return jnp.where(counts > 0, -jnp.inf, logits)


@jax.jit
def score(fns, prompts, continuations):
    """Log p(continuation | prompt) of each of a batch, [B]; tokens [B, L] and [B, T]."""
    length = prompts.shape[1] + continuations.shape[1]
    state = fns.init(fns.params, prompts, length, return_logprobs=True)
    _, state = fns.extend(fns.params, continuations, state)
    return state.logprobs.sum(axis=1)


def main(original, text, steps=24):
    """Runs all four on a model, for which its 4-bit self drafts, and prints what they find."""
    model = fdq.quantize(original, "W8A16C8")
    target = fdq.functional(model)
    drafter = fdq.functional(fdq.quantize(original, "W4A16C8"))
    prompt = np.int32(text.encode("Return the number of ", bos=True))

    beams, scores = beam_search(target, prompt, beams=3, steps=steps)
    for tokens, found in zip(beams, scores, strict=True):
        print(f"beam search, log p = {found:.2f}: {text.decode(tokens.tolist())!r}")
    again = score(target, np.tile(prompt, (3, 1)), beams)
    print("the same by scoring:", np.round(np.asarray(again), 2).tolist())

    begin = jax.jit(lambda fns: fns.init(fns.params, prompt[None], 256))
    state, drafted, counts = begin(target), begin(drafter), []
    while state.length[0] < len(prompt) + steps:
        state, drafted, accepted = speculate(target, drafter, state, drafted, draft_length=4)
        counts.append(int(accepted[0]))
    generated = state.generated()[0][:steps]
    print(f"speculation, {counts} of 4 accepted: {text.decode(generated)!r}")

    constrained = fdq.generate(
        model, [prompt.tolist()], steps, stop_tokens=(), logits_processor=no_token_twice
    )[0]
    print(f"no token twice: {text.decode(constrained)!r}")


if __name__ == "__main__":
    directory = pathlib.Path(__file__).parent / "tiny_ernie"
    main(fdq.load(directory), Tokenizer.load(directory))
