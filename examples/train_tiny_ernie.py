"""Train the small ERNIE-4.5-MoE model that ships in `examples/tiny_ernie`.

    python examples/train_tiny_ernie.py --out examples/tiny_ernie
    python examples/train_tiny_ernie.py --out /tmp/tiny --steps 50      # a quick trial

The model is the architecture of transformers' `Ernie4_5_MoeForCausalLM`, shrunk until its bfloat16
weights fit a git repository. It is trained on the sources of Python's standard library, so there is
nothing to download, and written in Hugging Face format with its tokenizer. Training is plain JAX:
matrices are moved by Muon (orthogonalized momentum), the rest by Adam, and the routers are balanced
without an auxiliary loss, by nudging the correction bias that only expert selection sees.

Needs optax, tokenizers and safetensors, and `fdq` itself for the text. With glibc, much of a step's
time can go into pages that malloc returns to the kernel and fetches again; keeping them made
training 1.8 times as fast on two cores:

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=268435456
    export MALLOC_ARENA_MAX=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
"""

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tokenizers

from fdq.analysis import sample_text

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2, as in ERNIE-4.5
EVAL_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; every contraction axis is a multiple of 128, which all formats accept."""

    vocab: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    dense_ff: int = 512  # layer 0 is dense, the others are mixtures of experts
    experts: int = 4
    top_k: int = 2
    expert_ff: int = 256  # also the width of the one shared expert
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    max_positions: int = 4096

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


# ---------------------------------------------------------------------------------------------
# Model. Weights are [in, out]; `experts.*` are [experts + 1, in, out], the shared expert last.
# ---------------------------------------------------------------------------------------------


def init_params(config: Config, seed: int) -> dict:
    """Random float32 parameters; matrices are normal with variance 1 / in, the embedding 0.02."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / math.sqrt(shape[-2])).astype(np.float32)

    h, d = config.hidden, config.head_dim
    residual = 1 / math.sqrt(2 * config.layers)  # keeps the residual stream's variance at 1
    layers = []
    for index in range(config.layers):
        layer = {
            "input_norm": np.ones(h, np.float32),
            "post_norm": np.ones(h, np.float32),
            "q": matrix(h, config.heads * d),
            "k": matrix(h, config.kv_heads * d),
            "v": matrix(h, config.kv_heads * d),
            "o": matrix(config.heads * d, h, scale=residual),
        }
        if index == 0:
            ff, lead = config.dense_ff, ()
        else:
            ff, lead = config.expert_ff, (config.experts + 1,)
            layer["router"] = matrix(h, config.experts)
        layer["gate"] = matrix(*lead, h, ff)
        layer["up"] = matrix(*lead, h, ff)
        layer["down"] = matrix(*lead, ff, h, scale=residual)
        layers.append(layer)
    embedding = (rng.standard_normal((config.vocab, h)) * 0.02).astype(np.float32)
    return {"embedding": embedding, "layers": layers, "norm": np.ones(h, np.float32)}


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scale x to x / rms(x) * weight over the last axis, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight).astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Interleaved rotary embedding (pairs 2i, 2i + 1) of x [batch, length, heads, head_dim].

    The turn by 90 degrees, (x0, x1) -> (-x1, x0), is a matmul: exact, since each output is one
    input, and its gradient is much faster on CPU than that of strided slices.
    """
    length, d = x.shape[1], x.shape[-1]
    frequency = theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None, :]
    angle = jnp.repeat(angle, 2, axis=1)[None, :, None, :]
    turn = np.zeros((d, d), np.float32)
    even = np.arange(0, d, 2)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    turned = (x @ jnp.asarray(turn, x.dtype)).astype(jnp.float32)
    return (x.astype(jnp.float32) * jnp.cos(angle) + turned * jnp.sin(angle)).astype(x.dtype)


def attention(x: jax.Array, p: dict, config: Config) -> jax.Array:
    """Causal grouped-query attention of x [batch, length, hidden]."""
    b, t, _ = x.shape
    d, group = config.head_dim, config.heads // config.kv_heads
    q = rotate((x @ p["q"]).reshape(b, t, config.heads, d), config.rope_theta)
    k = rotate((x @ p["k"]).reshape(b, t, config.kv_heads, d), config.rope_theta)
    v = (x @ p["v"]).reshape(b, t, config.kv_heads, d)
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))  # [batch, heads, length, head_dim]
    scores = (q @ k.mT).astype(jnp.float32) / math.sqrt(d)
    causal = jnp.tril(jnp.ones((t, t), bool))
    scores = jnp.where(causal[None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, -1) @ p["o"]


def mixture(x: jax.Array, p: dict, bias: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Top-k mixture of SwiGLU experts plus a shared one; also each expert's share of the load.

    Every expert is computed for every token and masked: at this size one large matmul is faster
    than gathering. The shared expert is one more expert whose weight is always 1.

    Args:
      x: [batch, length, hidden].
      p: `router` [hidden, experts] and the stacked experts.
      bias: [experts] correction bias; it chooses experts and does not weigh them.
      config: sizes.

    Returns:
      [batch, length, hidden], and [experts] fractions of the assignments (they sum to 1).
    """
    tokens = x.reshape(-1, x.shape[-1])
    probability = jax.nn.softmax(tokens.astype(jnp.float32) @ p["router"].astype(jnp.float32))
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probability) + bias[None], config.top_k)
    mask = jax.nn.one_hot(chosen, config.experts, dtype=jnp.float32).sum(axis=1)
    weight = probability * mask
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-12)
    weight = jnp.concatenate([weight, jnp.ones_like(weight[:, :1])], axis=1).astype(x.dtype)

    def side_by_side(w: jax.Array) -> jax.Array:  # [experts + 1, in, out] -> [in, all outs]
        return w.transpose(1, 0, 2).reshape(w.shape[1], -1)

    h = jax.nn.silu(tokens @ side_by_side(p["gate"])) * (tokens @ side_by_side(p["up"]))
    h = h.reshape(-1, config.experts + 1, config.expert_ff) * weight[:, :, None]
    y = h.reshape(tokens.shape[0], -1) @ p["down"].reshape(-1, x.shape[-1])
    return y.reshape(x.shape), mask.mean(axis=0) / config.top_k


def forward(
    params: dict, biases: jax.Array, tokens: jax.Array, config: Config, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Logits [batch, length, vocab] of `dtype` and expert loads [layers - 1, experts].

    Args:
      params: as `init_params` makes them.
      biases: [layers - 1, experts] float32 correction biases.
      tokens: [batch, length] integers.
      config: sizes.
      dtype: what matmuls are computed in; norms, router and softmax are float32 always.
    """

    # Norms and routers are used in float32 below, whatever the dtype of the matrices.
    def cast(path: tuple, a: jax.Array) -> jax.Array:
        kept = a.ndim == 1 or path[-1] == jax.tree_util.DictKey("router")
        return a if kept else a.astype(dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    x = params["embedding"][tokens]
    loads = []
    for index, p in enumerate(params["layers"]):
        x = x + attention(rms_norm(x, p["input_norm"], config.norm_eps), p, config)
        h = rms_norm(x, p["post_norm"], config.norm_eps)
        if index == 0:
            x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        else:
            y, load = mixture(h, p, biases[index - 1], config)
            x = x + y
            loads.append(load)
    x = rms_norm(x, params["norm"], config.norm_eps)
    return x @ params["embedding"].T, jnp.stack(loads)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats per token, [batch, length], of logits [batch, length, vocab]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


# ---------------------------------------------------------------------------------------------
# Optimizer.
# ---------------------------------------------------------------------------------------------


def orthogonalize(m: jax.Array, steps: int = 5) -> jax.Array:
    """Nearly the orthogonal polar factor of each matrix in m [..., a, b].

    Newton-Schulz iteration with the coefficients of Keller Jordan's Muon. In bfloat16: it only has
    to bring the singular values near 1, and it is a quarter of the step's time in float32.
    """
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    x = x.astype(jnp.bfloat16)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    x = x.astype(jnp.float32)
    return x.mT if tall else x


def muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Orthogonalized Nesterov momentum for matrices [..., in, out], unit learning rate."""

    def update(grads, state, params=None):
        del params
        state = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, grads)

        def direction(m: jax.Array) -> jax.Array:
            return -(max(1.0, m.shape[-1] / m.shape[-2]) ** 0.5) * orthogonalize(m)

        return jax.tree.map(direction, ahead), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def make_optimizer(params: dict, muon_rate: float, adam_rate: float):
    """Muon for the layers' matrices, Adam for embedding, norms and routers."""

    def kind(path: tuple, _) -> str:
        matrices = ("q", "k", "v", "o", "gate", "up", "down")
        return "muon" if getattr(path[-1], "key", None) in matrices else "adam"

    labels = jax.tree_util.tree_map_with_path(kind, params)
    rules = {
        "muon": optax.chain(muon(), optax.scale(muon_rate)),
        "adam": optax.adam(adam_rate, b1=0.9, b2=0.95),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rules, labels))


def make_step(config: Config, optimizer, bias_rate: float):
    """The jitted training step: (params, state, biases, tokens, rate) -> the same, loss, loads."""

    def loss_fn(params, biases, tokens):
        logits, loads = forward(params, biases, tokens[:, :-1], config, jnp.bfloat16)
        return cross_entropy(logits, tokens[:, 1:]).mean(), loads

    def step(params, state, biases, tokens, rate):
        (loss, loads), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, biases, tokens)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
        # Auxiliary-loss-free balancing: an expert with less than its share becomes easier to pick.
        biases = biases + bias_rate * rate * jnp.sign(1 / config.experts - loads)
        return params, state, biases, loss, loads

    return jax.jit(step, donate_argnums=(0, 1, 2))


# ---------------------------------------------------------------------------------------------
# Data.
# ---------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: every byte string has tokens, and decoding is exact."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one row of ids, each as <s> text </s>."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([bos, *e.ids, eos], np.int32) for e in encoded])


def batches(stream: np.ndarray, batch: int, length: int, seed: int):
    """Endless [batch, length + 1] rows: each epoch cuts the stream at a new phase and shuffles."""
    rng = np.random.default_rng(seed)
    while True:
        phase = int(rng.integers(length))
        starts = rng.permutation(np.arange(phase, len(stream) - length - 1, length))
        for i in range(0, len(starts) - batch + 1, batch):
            yield np.stack([stream[s : s + length + 1] for s in starts[i : i + batch]])


def bits_per_byte(
    params: dict, biases: jax.Array, config: Config, tokenizer: tokenizers.Tokenizer, text: str
) -> tuple[float, int]:
    """Bits per byte of UTF-8 in float32, and the number of tokens of `text`.

    The row <s> + tokens(text) is cut into windows of 256 inputs that do not overlap; the targets
    are the row shifted by one, so every token of `text` is predicted exactly once.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    row = np.array([tokenizer.token_to_id(BOS), *ids], np.int32)
    windows = -(-len(ids) // EVAL_LENGTH)
    padded = np.zeros(windows * EVAL_LENGTH + 1, np.int32)
    padded[: len(row)] = row
    inputs = padded[:-1].reshape(windows, EVAL_LENGTH)
    targets = padded[1:].reshape(windows, EVAL_LENGTH)
    counted = (np.arange(windows * EVAL_LENGTH) < len(ids)).reshape(windows, EVAL_LENGTH)

    @jax.jit
    def nats(x, y, keep):
        logits, _ = forward(params, biases, x, config, jnp.float32)
        return jnp.sum(cross_entropy(logits, y) * keep)

    total = sum(
        float(nats(inputs[i : i + 1], targets[i : i + 1], counted[i : i + 1]))
        for i in range(windows)
    )
    return total / math.log(2) / len(text.encode("utf-8")), len(ids)


# ---------------------------------------------------------------------------------------------
# Output in Hugging Face format.
# ---------------------------------------------------------------------------------------------


def huggingface_config(config: Config) -> dict:
    """`config.json` with the keys of transformers' `Ernie4_5_MoeConfig`."""
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.dense_ff,
        "max_position_embeddings": config.max_positions,
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": config.expert_ff,
        "moe_k": config.top_k,
        "moe_layer_end_index": config.layers - 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_norm_min": 1e-12,
        "moe_num_experts": config.experts,
        "moe_num_shared_experts": 1,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_cache": True,
        "vocab_size": config.vocab,
    }


def huggingface_tensors(params: dict, biases: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors under their on-disk names: linear weights [out, in] bfloat16, routing float32."""
    bfloat16 = jnp.bfloat16.dtype
    tensors = {
        "model.embed_tokens.weight": np.asarray(params["embedding"]).astype(bfloat16),
        "model.norm.weight": np.asarray(params["norm"]).astype(bfloat16),
    }

    def linear(name: str, w: np.ndarray) -> None:
        tensors[f"{name}.weight"] = np.ascontiguousarray(np.asarray(w).T).astype(bfloat16)

    for index, p in enumerate(params["layers"]):
        base = f"model.layers.{index}"
        for ours, theirs in (("input", "input"), ("post", "post_attention")):
            norm = np.asarray(p[f"{ours}_norm"]).astype(bfloat16)
            tensors[f"{base}.{theirs}_layernorm.weight"] = norm
        for name in "qkvo":
            linear(f"{base}.self_attn.{name}_proj", p[name])
        for name in ("gate", "up", "down"):
            if index == 0:
                linear(f"{base}.mlp.{name}_proj", p[name])
                continue
            for expert, w in enumerate(p[name][:-1]):
                linear(f"{base}.mlp.experts.{expert}.{name}_proj", w)
            linear(f"{base}.mlp.shared_experts.{name}_proj", p[name][-1])
        if index:
            router = np.ascontiguousarray(np.asarray(p["router"], np.float32).T)
            tensors[f"{base}.mlp.gate.weight"] = router
            bias = np.asarray(biases[index - 1], np.float32)[None]
            tensors[f"{base}.mlp.moe_statics.e_score_correction_bias"] = bias
    return tensors


def as_stored(params: dict) -> dict:
    """The parameters as the written file holds them: rounded to bfloat16, the router not."""

    def rounded(path: tuple, a: jax.Array) -> jax.Array:
        if path[-1] == jax.tree_util.DictKey("router"):
            return a
        return a.astype(jnp.bfloat16).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(rounded, params)


def write_model(
    out: pathlib.Path, config: Config, params: dict, biases: np.ndarray, tokenizer, record: dict
) -> None:
    """Write all files to a sibling of `out`, then move them into place.

    Files in `out` that training does not make, such as its README, are kept.
    """
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    def write_json(name: str, value: dict) -> None:
        (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    tensors = huggingface_tensors(jax.device_get(params), biases)
    data = safetensors.numpy.save(tensors, {"format": "pt"})
    (temporary / "model.safetensors").write_bytes(data)
    tokenizer.save(str(temporary / "tokenizer.json"))
    write_json("config.json", huggingface_config(config))
    generation = {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    write_json("generation_config.json", generation)
    write_json(
        "tokenizer_config.json",
        {
            "add_bos_token": True,
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": config.max_positions,
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json("training.json", record)
    out.mkdir(parents=True, exist_ok=True)
    for path in temporary.iterdir():
        path.replace(out / path.name)
    temporary.rmdir()


# ---------------------------------------------------------------------------------------------
# The command.
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the small ERNIE-4.5-MoE model on Python's standard library.",
        epilog="example: python examples/train_tiny_ernie.py --out examples/tiny_ernie",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="finish within this time: the schedule follows the clock where it is ahead",
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (default: 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="default: 0.02")
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="default: 0.003")
    parser.add_argument(
        "--bias-rate", type=float, default=1e-3, help="correction bias step (default: 0.001)"
    )
    parser.add_argument("--warm-up", type=int, default=30, help="steps (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch < 1 or args.length < 1:
        parser.error("--steps, --batch and --length must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = Config()
    started = time.perf_counter()
    texts = [text for _, text in sample_text.source_files(held_out=False)]
    train_sha256 = sample_text.training_text().sha256
    print(f"training text: {len(texts)} files, {sum(map(len, texts)) / 1e6:.2f} M characters")
    tokenizer = train_tokenizer(texts, config.vocab)
    stream = token_stream(tokenizer, texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(f"tokenizer: {config.vocab} tokens, {size / len(stream):.3f} bytes a token", flush=True)

    params = jax.tree.map(jnp.asarray, init_params(config, args.seed))
    count = sum(a.size for a in jax.tree.leaves(params))
    print(
        f"model: {count / 1e6:.2f} M parameters, {2 * count / 1e6:.2f} MB in bfloat16", flush=True
    )
    optimizer = make_optimizer(params, args.muon_rate, args.adam_rate)
    state = optimizer.init(params)
    biases = jnp.zeros((config.layers - 1, config.experts), jnp.float32)
    train_step = make_step(config, optimizer, args.bias_rate)
    data = batches(stream, args.batch, args.length, args.seed)

    begun, step, progress, loads = time.perf_counter(), 0, 0.0, None
    recent: list[float] = []
    while progress < 1:
        rate = min(1.0, (step + 1) / args.warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        params, state, biases, loss, loads = train_step(params, state, biases, next(data), rate)
        step += 1
        recent = [*recent[-19:], float(loss)]
        elapsed = time.perf_counter() - begun
        progress = max(step / args.steps, elapsed / 60 / args.minutes)
        if step in (1, 5) or step % 20 == 0 or progress >= 1:
            if not math.isfinite(recent[-1]):
                sys.exit(f"loss is {recent[-1]} at step {step}: lower --muon-rate and --adam-rate")
            speed = step * args.batch * args.length / elapsed
            print(
                f"step {step:5d}  loss {np.mean(recent):.4f} nats/token  {speed:6.0f} tokens/s  "
                f"load {float(loads.min()):.2f}..{float(loads.max()):.2f}  "
                f"ETA {max(0.0, elapsed * (1 / progress - 1)) / 60:.1f} min",
                flush=True,
            )
    seconds = time.perf_counter() - begun

    stored = as_stored(params)
    heldout = sample_text.heldout_text()
    bpb, heldout_tokens = bits_per_byte(stored, biases, config, tokenizer, heldout.text)
    print(f"held-out: {bpb:.4f} bits/byte on {len(heldout.text.encode())} bytes", flush=True)
    record = {
        "parameters": count,
        "steps": step,
        "tokens_seen": step * args.batch * args.length,
        "training_stream_tokens": len(stream),
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(step * args.batch * args.length / seconds, 1),
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "final_training_loss_nats_per_token": round(float(np.mean(recent)), 4),
        "heldout_bits_per_byte": round(bpb, 4),
        "heldout_tokens": heldout_tokens,
        "heldout_sha256": heldout.sha256,
        "training_text_sha256": train_sha256,
        "versions": {"python": heldout.python, "jax": jax.__version__, "optax": optax.__version__},
    }
    write_model(args.out, config, params, np.asarray(biases), tokenizer, record)
    total = (time.perf_counter() - started) / 60
    print(f"wrote {args.out} in {total:.1f} min")


if __name__ == "__main__":
    main()
