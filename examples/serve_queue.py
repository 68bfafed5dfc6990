"""Continuous batching: a queue of requests through one batch whose rows are slots.

    python examples/serve_queue.py --help
    python examples/serve_queue.py --slots 4 --check

A batch decodes in one compiled step. A sequence that is finished leaves its slot at once and the
next of the queue enters it, while the others go on: `admit` and `advance` are pure functions, and
the queue is an ordinary Python loop around them. All requests begin with the same text, which is
read once: each forks the cache that holds it.
"""

import argparse
import collections
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from fdq.analysis.shipped_model import shipped_model_path
from fdq.decoding.state import DecodeState
from fdq.decoding.tokenizer import Tokenizer
from fdq.sharding import parse_mesh

PREFIX = '"""Functions for lists of numbers."""\n\n\n'
REQUESTS = (
    "def mean(values):\n", "def largest(values):\n", "def count_even(values):\n",
    "def total(values):\n    ", "def is_sorted(values):\n    for", "class Stack:\n    def push(",
    "def reverse(values):\n    return", "import ", "def smallest(values):\n", "for i in range(",
)  # fmt: skip


def idle(model, slots, capacity):
    """A batch of empty slots. An empty slot is a finished sequence: steps leave it as it is."""
    empty = jnp.zeros((slots, 1), jnp.int32)
    state = DecodeState.start(empty, jnp.ones(slots, jnp.int32), model.init_cache(slots, capacity))
    return dataclasses.replace(state, finished=jnp.ones(slots, bool))


@functools.partial(jax.jit, donate_argnums=1)
def admit(fns, state, slot, prefix, tokens, count):
    """The state with a request in `slot`: the text of `prefix`, then `count` of `tokens [1, T]`.

    `prefix` is a state of one sequence and is not donated: all requests read their own tokens into
    copies of it. Padding tokens are read too, and forgotten by the rollback.
    """
    _, one = fns.extend(fns.params, tokens, prefix)
    one = one.rollback(prefix.length + count)
    return state.insert(slot, dataclasses.replace(one, prompt_length=one.length))


@functools.partial(jax.jit, donate_argnums=1, static_argnames="steps")
def advance(fns, state, limits, stop_tokens, *, steps):
    """`steps` greedy tokens for each sequence that is not finished; `limits [B]` are lengths."""

    def step(state, _):
        logits, state = fns.step(fns.params, state)
        state = state.push(logits.argmax(-1), stop_tokens)
        return dataclasses.replace(state, finished=state.finished | (state.length >= limits)), None

    return jax.lax.scan(step, state, None, length=steps)[0]


def serve(model, prefix, requests, *, slots, capacity, max_new_tokens, stop_tokens=(), steps=4):
    """Yields `(request, its new tokens)` as they finish; `requests` are lists of tokens.

    `slots` are decoded at once. `capacity` are tokens of the longest sequence: prefix, request,
    answer, and padding, for requests are padded to powers of two, so that few lengths are compiled.
    What has finished is looked at after so many `steps`; the tokens are the same for any.
    """
    fns = fdq.functional(model)
    stops = jnp.array([-1, *stop_tokens], jnp.int32)
    # As many as slots, for a mesh may deal sequences out; one of them is kept.
    cache = model.init_cache(slots, capacity)
    shared = fdq.prefill(model, [prefix] * slots, cache).take([0])
    state, limits = idle(model, slots, capacity), np.zeros(slots, np.int32)
    waiting = collections.deque(enumerate(requests))
    running = {}  # slot: request
    while waiting or running:
        for slot in range(slots):
            if slot not in running and waiting:
                running[slot], tokens = waiting.popleft()
                count = len(tokens)
                padded = np.zeros((1, max(8, 1 << (count - 1).bit_length())), np.int32)
                padded[0, :count] = tokens
                state = admit(fns, state, np.int32(slot), shared, padded, np.int32(count))
                limits[slot] = len(prefix) + count + max_new_tokens
        state = advance(fns, state, limits, stops, steps=steps)
        finished = np.asarray(state.finished)
        done = [slot for slot in running if finished[slot]]
        if done:
            generated = state.generated()
            for slot in done:
                yield running.pop(slot), generated[slot]


def main(arguments=None):
    """Serves a queue with the model that ships with fdq, and prints what it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=shipped_model_path(), help="directory of a checkpoint")
    parser.add_argument("--scheme", default="W4A16C8", help="weights, activations, cache")
    parser.add_argument("--mesh", help="tensor=2,data=2: several devices")
    parser.add_argument("--slots", type=int, default=4, help="sequences at once")
    parser.add_argument("--requests", type=int, default=len(REQUESTS), help="in the queue")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of each request, at most")
    parser.add_argument("--check", action="store_true", help="compare with each request alone")
    options = parser.parse_args(arguments)

    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    model = fdq.load(options.model, options.scheme, mesh=mesh)
    text = Tokenizer.load(options.model)
    prefix = text.encode(PREFIX, bos=True)
    requests = [text.encode(REQUESTS[i % len(REQUESTS)]) for i in range(options.requests)]
    stops = model.config.eos_token_ids
    room = max(1 << len(tokens).bit_length() for tokens in requests)
    settings = {
        "slots": options.slots,
        "capacity": len(prefix) + max(room, 8) + options.max_new_tokens,
        "max_new_tokens": options.max_new_tokens,
        "stop_tokens": stops,
    }
    begin, answers = time.perf_counter(), {}
    for request, tokens in serve(model, prefix, requests, **settings):
        answers[request] = tokens
        print(f"--- {request}\n{text.decode([*requests[request], *tokens])}")
    seconds, count = time.perf_counter() - begin, sum(map(len, answers.values()))
    print(f"--- {count} tokens of {len(answers)} requests in {seconds:.1f} s, compiling included")
    if options.check:
        for request, tokens in enumerate(requests):
            alone = [[*prefix, *tokens]] * options.slots  # nothing else in the batch
            alone = fdq.generate(model, alone, options.max_new_tokens, stop_tokens=stops)
            assert alone[0] == answers[request], f"request {request} differs from itself alone"
        print("each is what the model says to it alone")
    return answers


if __name__ == "__main__":
    main()
