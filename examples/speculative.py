"""Speculative decoding: a model in fewer bits drafts, and verifies what it drafted in more.

    python examples/speculative.py --help
    python examples/speculative.py --draft W2A16-g64 --length 4

Reading a token and reading five cost the same weights. So a draft of the same model in W4 or W2
guesses a few tokens, and the target reads them in one pass: those that it would have said itself
stay, and after them comes its own next one. The result is the target's greedy text, whatever the
draft says; how much is gained depends on how often they agree, which is measured here.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from fdq.analysis.shipped_model import shipped_model_path
from fdq.decoding.tokenizer import Tokenizer
from fdq.sharding import parse_mesh

PROMPTS = ("def mean(values):\n    ", "import os\n", "class Queue:\n    def ", "for line in ")


def draft(fns, state, length):
    """The `length` tokens [B, length] that a model would say next, and its state after them."""

    def step(state, _):
        logits, state = fns.step(fns.params, state)
        token = logits.argmax(-1)
        return state.push(token), token

    state, tokens = jax.lax.scan(step, state, None, length=length)
    return tokens.T, state


@functools.partial(jax.jit, static_argnames=("length", "capacity"))
def speculate(target, drafter, prompts, limit, *, length, capacity):
    """Greedy text of `target` after `prompts [B, L]`, until each sequence has `limit` tokens.

    Returns the target's state, rounds [B] and accepted tokens [B] of each sequence.
    """
    state = target.init(target.params, prompts, capacity)
    drafted = drafter.init(drafter.params, prompts, capacity)

    def round_(carry):
        state, drafted, rounds, accepted = carry
        known, live = state.length, ~state.finished
        # One token more than is verified, so that the draft's cache holds the last of them too.
        tokens, drafted = draft(drafter, drafted, length + 1)
        logits, state = target.extend(target.params, tokens, state)
        own = logits.argmax(-1)
        agrees = (own == tokens)[:, :length] & live[:, None]
        agree = jnp.cumprod(agrees, axis=1).sum(axis=1)
        # Behind those that it agrees with comes the target's own.
        following = jnp.take_along_axis(own, agree[:, None], axis=1)[:, 0]
        state = state.rollback(known + agree).push(following)
        drafted = drafted.rollback(known + agree).push(following)
        # A sequence that has enough is finished: it takes nothing while the others go on.
        enough = state.finished | (state.length >= limit)
        state = dataclasses.replace(state, finished=enough)
        drafted = dataclasses.replace(drafted, finished=enough)
        return state, drafted, rounds + live.astype(jnp.int32), accepted + agree

    zeros = jnp.zeros(prompts.shape[0], jnp.int32)
    state, _, rounds, accepted = jax.lax.while_loop(
        lambda carry: ~carry[0].finished.all(), round_, (state, drafted, zeros, zeros)
    )
    return state, rounds, accepted


@functools.partial(jax.jit, static_argnames=("steps", "capacity"))
def greedy(fns, prompts, *, steps, capacity):
    """What a model says by itself, one token a step."""
    state = fns.init(fns.params, prompts, capacity)
    return draft(fns, state, steps)[0]


def timed(call):
    """What a call returns, and its seconds once it is compiled."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    return jax.block_until_ready(call()), time.perf_counter() - begin


def main(arguments=None):
    """Drafts with the model that ships with fdq for itself, and prints how often it is right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=shipped_model_path(), help="directory of a checkpoint")
    parser.add_argument("--target", default="W8A16C8", help="scheme of the model that decides")
    parser.add_argument("--draft", default="W4A16C8", help="scheme of the one that drafts")
    parser.add_argument("--length", type=int, default=3, help="tokens of a draft")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of each prompt")
    parser.add_argument("--mesh", help="tensor=2: several devices")
    options = parser.parse_args(arguments)

    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    target, drafter = (
        fdq.functional(fdq.load(options.model, scheme, mesh=mesh))
        for scheme in (options.target, options.draft)
    )
    text = Tokenizer.load(options.model)
    prompts = [text.encode(prompt, bos=True) for prompt in PROMPTS]
    width, new = min(map(len, prompts)), options.max_new_tokens
    prompts = np.int32([tokens[:width] for tokens in prompts])
    settings = {"length": options.length, "capacity": width + new + options.length + 2}
    (state, rounds, accepted), fast = timed(
        lambda: speculate(target, drafter, prompts, width + new, **settings)
    )
    capacity = settings["capacity"]
    expected, slow = timed(lambda: greedy(target, prompts, steps=new, capacity=capacity))
    for row, tokens in enumerate(np.asarray(state.tokens)):
        found = tokens[width : width + new]
        assert (found == expected[row]).all(), f"prompt {row}: not the target's own text"
        print(f"--- {text.decode(tokens[: width + new].tolist())}")
    share = float(accepted.sum() / (options.length * rounds.sum()))
    tokens = float((rounds + accepted).sum() / rounds.sum())
    print(
        f"--- {options.draft} drafts for {options.target}: {share:.0%} of its tokens accepted, "
        f"{tokens:.2f} a pass of the target; {new * len(prompts) / fast:.0f} tokens/s, "
        f"{new * len(prompts) / slow:.0f} without a draft"
    )
    return share


if __name__ == "__main__":
    main()
