"""Reads a Hugging Face config.json key by key, and complains about what nobody read."""

from collections.abc import Mapping
from typing import Any

from fdq.nn.rotary import ROPE_TYPES, RotaryConfig

_REQUIRED = object()
# By the type of the rotation: the config's keys, and the fields of `RotaryConfig` that they fill.
_FACTORS = {"factor": ("factor", float)}
_ROPE_FIELDS = {
    "linear": _FACTORS,
    "llama3": _FACTORS
    | {f"{side}_freq_factor": (f"{side}_freq_factor", float) for side in ("low", "high")}
    | {"original_max_position_embeddings": ("original_max_position", int)},
}
_FULL, _SLIDING = "full_attention", "sliding_attention"

# Keys of any model that say how it was trained, stored or is to be run, never what it computes.
# num_nextn_predict_layers: extra layers for multi-token prediction, which decoding can skip;
# quantization_config: the checkpoint reader consumes it; sliding_window, max_window_layers: mean
# nothing unless use_sliding_window is true.
_NEUTRAL = (
    "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype", "embd_pdrop",
    "hidden_dropout_prob", "id2label", "initializer_range", "label2id", "max_window_layers",
    "model_type", "name_or_path", "num_nextn_predict_layers", "output_attentions",
    "output_hidden_states", "output_router_logits", "pretraining_tp", "quantization_config",
    "return_dict", "router_aux_loss_coef", "sep_token_id", "sliding_window", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache",
)  # fmt: skip


class ConfigReader:
    """The config of one family; every key must be read, known to be neutral, null or false."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.family = config.get("model_type")
        self._read: set[str] = set(_NEUTRAL)

    def get(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of `keys` (spellings of one thing) that is there and not null."""
        self._read.update(keys)
        for key in keys:
            if self.config.get(key) is not None:
                return self.config[key]
        if default is _REQUIRED:
            raise ValueError(f"{self.family} config lacks {' or '.join(keys)}")
        return default

    def integer(self, *keys: str, default: Any = _REQUIRED) -> int:
        """As `get`, for a whole number that is not negative."""
        number = self.get(*keys, default=default)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{self.family} config: {keys[0]} must be an integer, got {number!r}")
        return number

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuses a value of `key` other than `allowed`; a missing key is taken as allowed."""
        found = self.get(key, default=allowed[0])
        if found not in allowed:
            raise ValueError(
                f"{self.family} config: {key}={found!r} is not supported; "
                f"expected {' or '.join(map(repr, allowed))}"
            )

    def neutral(self, *keys: str) -> None:
        """Declares keys of this family that do not change what the model computes."""
        self._read.update(keys)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One or several token numbers as a tuple."""
        found = self.get(key, default=())
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    def dtype(self) -> str:
        """The dtype the checkpoint was saved in, bfloat16 where it does not say."""
        return str(self.get("dtype", "torch_dtype", default="bfloat16")).removeprefix("torch.")

    def sliding_windows(self, layers: int) -> tuple[int | None, ...]:
        """The window of each layer; () where all layers see everything.

        Layers have one where `layer_types` says so, or else from `max_window_layers` on, and only
        with `use_sliding_window`.
        """
        if not self.get("use_sliding_window", default=False):
            self.full_attention()
            return ()
        window = self.integer("sliding_window")
        kinds = self.get("layer_types", default=None)
        if kinds is None:
            first = self.integer("max_window_layers")
            kinds = [_SLIDING if layer >= first else _FULL for layer in range(layers)]
        unknown = sorted(set(kinds) - {_FULL, _SLIDING})
        if unknown or len(kinds) != layers:
            raise ValueError(
                f"{self.family} config: layer_types has {len(kinds)} entries"
                f"{f', {unknown} among them' if unknown else ''}; expected {_FULL!r} or "
                f"{_SLIDING!r} for each of {layers} layers"
            )
        windows = tuple(window if kind == _SLIDING else None for kind in kinds)
        return windows if set(windows) != {None} else ()

    def full_attention(self) -> None:
        """Refuses sliding windows, where the family has none."""
        self.must_be("use_sliding_window", False)
        kinds = set(self.get("layer_types", default=())) - {_FULL}
        if kinds:
            raise ValueError(
                f"{self.family} config: layer_types {sorted(kinds)} are not supported; "
                "expected 'full_attention' in every layer"
            )

    def rotary(self, *, theta: float, interleaved: bool = False) -> RotaryConfig:
        """Rotary positions, from `rope_parameters` or `rope_theta` and `rope_scaling`.

        `theta` is meant where the config has none; `interleaved` is the family's convention.
        """
        top_theta = self.get("rope_theta", default=theta)
        given = dict(self.get("rope_parameters", "rope_scaling", default={}))
        given.setdefault("rope_theta", top_theta)
        new_type, old_type = given.pop("rope_type", None), given.pop("type", None)
        rope_type = new_type or old_type or "default"
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"{self.family} config: rope_type {rope_type!r} is not supported; supported are "
                + ", ".join(map(repr, ROPE_TYPES))
            )
        partial = given.pop("partial_rotary_factor", self.get("partial_rotary_factor", default=1))
        if partial != 1:
            raise ValueError(f"{self.family} config: partial_rotary_factor={partial} is not 1")
        fields: dict[str, Any] = {"theta": float(given.pop("rope_theta"))}
        for key, (field, kind) in _ROPE_FIELDS.get(rope_type, {}).items():
            if given.get(key) is None:
                raise ValueError(f"{self.family} config: rope parameters lack {key}")
            fields[field] = kind(given.pop(key))
        unknown = sorted(key for key, found in given.items() if found is not None)
        if unknown:
            raise ValueError(
                f"{self.family} config: rope parameters {unknown} are unknown for "
                f"rope_type {rope_type!r}"
            )
        return RotaryConfig(rope_type=rope_type, interleaved=interleaved, **fields)

    def base(self, *, epsilon: float, tie: bool) -> dict[str, Any]:
        """The fields that every family spells alike.

        `epsilon` of the norms and `tie` (tied embeddings) are meant where the config has neither.
        """
        self.must_be("hidden_act", "silu", "swish")
        heads = self.integer("num_attention_heads")
        hidden_size = self.integer("hidden_size")
        return {
            "model_type": self.family,
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": self.integer("intermediate_size"),
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", default=heads),
            "head_dim": self.integer("head_dim", default=hidden_size // heads),
            "rms_norm_epsilon": float(self.get("rms_norm_eps", default=epsilon)),
            "max_position": self.integer("max_position_embeddings", default=131072),
            "tie_word_embeddings": bool(self.get("tie_word_embeddings", default=tie)),
            "bos_token_id": self.get("bos_token_id", default=None),
            "eos_token_ids": self.token_ids("eos_token_id"),
            "pad_token_id": self.get("pad_token_id", default=None),
            "dtype": self.dtype(),
        }

    def finish(self) -> None:
        """Refuses keys that nobody read: they may change what the model computes."""
        unknown = {
            key: found
            for key, found in self.config.items()
            if key not in self._read and found is not None and found is not False
        }
        if unknown:
            raise ValueError(
                f"{self.family} config has keys that fdq does not know: {unknown}. If they do not "
                "change what the model computes, remove them from config.json"
            )
