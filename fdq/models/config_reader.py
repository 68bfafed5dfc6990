"""Reads a Hugging Face config.json key by key, and complains about what nobody read."""

from collections.abc import Mapping, Sequence
from typing import Any

from fdq.models.rotary_reader import is_number, read_rotary
from fdq.nn.rotary import RotaryConfig

_REQUIRED = object()
MOST_LAYERS = 1024
"""The deepest that are published have 126."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""What `layer_types` calls layers that see everything, and those with a window."""

_SILU = ("hidden_act", "silu", "swish")

# Keys of any model that say how it was trained, stored or is to be run, never what it computes:
# also what older programs wrote of generation, which has a file of its own.
# num_nextn_predict_layers: extra layers for multi-token prediction, which decoding can skip;
# quantization_config, compression_config: the checkpoint reader consumes them; sliding_window,
# max_window_layers: mean nothing unless use_sliding_window is true.
_NEUTRAL = (
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_commit_hash", "_experts_implementation", "_experts_implementation_internal",
    "_flash_attn_2_enabled", "_from_model_config", "_name_or_path", "_output_attentions",
    "add_bos_token", "add_eos_token", "architectures", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "attention_dropout", "attention_implementation",
    "attention_probs_dropout_prob", "attn_dropout", "attn_implementation", "auto_map",
    "bad_words_ids", "base_model_name_or_path", "begin_suppress_tokens", "bos_token",
    "cache_config", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout",
    "cls_token", "cls_token_id", "compile_config", "compression_config", "constraints",
    "decoder_start_token_id", "disable_compile", "diversity_penalty", "do_sample", "dola_layers",
    "dtype", "early_stopping", "embd_pdrop", "embedding_dropout", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "eos_token", "eot_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "finetuning_task", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "guidance_scale", "hidden_dropout",
    "hidden_dropout_prob", "id2label", "initializer_range", "is_assistant", "is_decoder",
    "is_llama_config", "label2id", "language", "length_penalty", "license", "logits_to_keep",
    "loss_type", "low_memory", "mask_token", "mask_token_id", "max_length",
    "max_matching_ngram_size", "max_new_tokens", "max_sequence_length", "max_time",
    "max_window_layers", "min_length", "min_new_tokens", "min_p", "model_max_length", "model_type",
    "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_labels",
    "num_nextn_predict_layers", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_logits", "output_past", "output_router_logits", "output_scores", "pad_token",
    "padding_side", "penalty_alpha", "prefill_chunk_size", "prefix", "pretraining_tp",
    "problem_type", "prompt_lookup_num_tokens", "quantization_config", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "resid_dropout", "resid_pdrop", "residual_dropout",
    "return_dict", "return_dict_in_generate", "return_legacy_cache", "router_aux_loss_coef",
    "router_jitter_noise", "router_z_loss_coef", "sep_token", "sep_token_id", "seq_length",
    "sequence_bias", "sliding_window", "stop_strings", "suppress_tokens", "target_lookbehind",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "token_healing",
    "tokenizer_class", "tokenizer_name", "top_h", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "trust_remote_code", "typical_p", "unk_token",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    "use_flash_attention_2", "use_flash_attn", "watermarking_config",
)  # fmt: skip


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class ConfigReader:
    """The config of one family; every key must be read, known to be neutral, null or false."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.family = config.get("model_type")
        self._read: set[str] = set(_NEUTRAL)

    def usual(self, **values: Any) -> None:
        """Declares what is meant where a config lacks a key; one that is null is not lacking.

        These are the defaults of transformers' config classes. They come before all else, for they
        are what every other method then finds.
        """
        self.config = {**values, **self.config}

    def get(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """The value of `keys`, spellings of one thing, where one is there and not null.

        Spellings that disagree are refused: which of them counts differs from program to program.
        """
        self._read.update(keys)
        found = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            both = " and ".join(f"{key}={value!r:.200}" for key, value in found.items())
            raise ValueError(
                f"{self.family} config: {both} are spellings of one thing; remove the wrong one"
            )
        if values:
            return values[0]
        if default is _REQUIRED:
            raise ValueError(f"{self.family} config lacks {' or '.join(keys)}")
        return default

    def integer(self, *keys: str, default: Any = _REQUIRED, least: int = 0) -> int:
        """As `get`, for a whole number of at least `least`."""
        number = self.get(*keys, default=default)
        if not _is_integer(number) or number < least:
            raise self.wrong(keys, f"an integer of at least {least}", number)
        return number

    def number(self, *keys: str, default: Any = _REQUIRED) -> float:
        """As `get`, for a finite number that is not negative."""
        number = self.get(*keys, default=default)
        if not is_number(number) or number < 0:
            raise self.wrong(keys, "a number of at least 0", number)
        return float(number)

    def flag(self, *keys: str, default: Any = _REQUIRED) -> bool:
        """As `get`, for true or false.

        Null is false, as in transformers, whatever is meant where the key is lacking.
        """
        if any(key in self.config for key in keys):
            default = False
        found = self.get(*keys, default=default)
        if not isinstance(found, bool):
            raise self.wrong(keys, "true or false", found)
        return found

    def integers(self, *keys: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """As `get`, for a list of whole numbers that are not negative."""
        found = self.get(*keys, default=default)
        if not isinstance(found, list | tuple) or not all(_is_integer(i) and i >= 0 for i in found):
            raise self.wrong(keys, "a list of integers", found)
        return tuple(found)

    def wrong(self, keys: tuple[str, ...], expected: str, found: Any) -> ValueError:
        """The error for a value of `keys` that is not what was expected."""
        name = next((key for key in keys if self.config.get(key) is not None), keys[0])
        return ValueError(f"{self.family} config: {name} must be {expected}, got {found!r:.200}")

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuses a value of `key` other than `allowed`; a missing key is taken as allowed."""
        found = self.get(key, default=allowed[0])
        if found not in allowed or isinstance(found, bool) is not isinstance(allowed[0], bool):
            raise ValueError(
                f"{self.family} config: {key}={found!r:.200} is not supported; "
                f"expected {' or '.join(map(repr, allowed))}"
            )

    def neutral(self, *keys: str) -> None:
        """Declares keys of this family that do not change what the model computes."""
        self._read.update(keys)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One or several token numbers as a tuple; -1 stands for none, as in old configs."""
        found = self.get(key, default=())
        found = tuple(found) if isinstance(found, list | tuple) else (found,)
        if not all(_is_integer(token) and -1 <= token < 2**31 for token in found):
            raise self.wrong((key,), "a token number or a list of them", self.config[key])
        return tuple(token for token in found if token >= 0)

    def token_id(self, key: str) -> int | None:
        """A single token number, or None."""
        found = self.token_ids(key)
        if len(found) > 1:
            raise self.wrong((key,), "a token number", self.config[key])
        return found[0] if found else None

    def dtype(self) -> str:
        """The dtype the checkpoint was saved in, bfloat16 where it does not say.

        `dtype` counts where an older `torch_dtype` says something else, as in transformers.
        """
        older = self.get("torch_dtype", default="bfloat16")
        return str(self.get("dtype", default=older)).removeprefix("torch.")

    def sliding_windows(self, layers: int) -> tuple[int | None, ...]:
        """The window of each layer; () where all layers see everything.

        Layers have one where `layer_types` says so, or else from `max_window_layers` on, and only
        with `use_sliding_window`.
        """
        if not self.flag("use_sliding_window", default=False):
            self.full_attention()
            return ()
        kinds = self.get("layer_types", default=None)
        if kinds is None:
            first = layers
            if self._window() is not None:
                first = self.integer("max_window_layers")
            kinds = [SLIDING if layer >= first else FULL for layer in range(layers)]
        return self._windows(kinds, layers)

    def window_of_all(self, layers: int, *, by_layer: bool = False) -> tuple[int | None, ...]:
        """As `sliding_windows`, where `sliding_window` alone says that there is one, in all layers.

        With `by_layer` the family lets `layer_types` say which layers have it.
        """
        self.neutral("use_sliding_window")
        window = self._window()
        usual = [FULL if window is None else SLIDING] * layers
        kinds = self.get("layer_types", default=usual)
        if kinds != usual and not by_layer:
            raise ValueError(
                f"{self.family} config: layer_types={kinds} is not supported: with "
                f"sliding_window={window} this family has {usual[0]!r} in all {layers} layers"
            )
        return self._windows(kinds, layers)

    def window_by_layer(self, usual: Sequence[str]) -> tuple[int | None, ...]:
        """As `sliding_windows`, where `layer_types` alone says which layers have a window.

        `usual` are the types of the layers where the config does not say.
        """
        self.neutral("use_sliding_window")
        return self._windows(self.get("layer_types", default=list(usual)), len(usual))

    def _window(self) -> int | None:
        if self.get("sliding_window", default=None) is None:
            return None
        return self.integer("sliding_window", least=1)

    def _windows(self, kinds: Any, layers: int) -> tuple[int | None, ...]:
        if not isinstance(kinds, list | tuple):
            raise self.wrong(("layer_types",), "a list of names", kinds)
        unknown = sorted(set(map(str, kinds)) - {FULL, SLIDING})
        if unknown or len(kinds) != layers:
            raise ValueError(
                f"{self.family} config: layer_types has {len(kinds)} entries"
                f"{f', {unknown} among them' if unknown else ''}; expected {FULL!r} or "
                f"{SLIDING!r} for each of {layers} layers"
            )
        if SLIDING not in kinds:
            return ()
        window = self.integer("sliding_window", least=1)
        return tuple(window if kind == SLIDING else None for kind in kinds)

    def full_attention(self) -> None:
        """Refuses sliding windows, where the family has none."""
        self.must_be("use_sliding_window", False)
        kinds = self.get("layer_types", default=())
        if not isinstance(kinds, list | tuple):
            raise self.wrong(("layer_types",), "a list of names", kinds)
        kinds = set(map(str, kinds)) - {FULL}
        if kinds:
            raise ValueError(
                f"{self.family} config: layer_types {sorted(kinds)} are not supported; "
                "expected 'full_attention' in every layer"
            )

    def rotary(
        self,
        *,
        theta: float,
        interleaved: bool = False,
        partial: bool = False,
        types: Mapping[str, str] | None = None,
    ) -> RotaryConfig:
        """Rotary positions, from `rope_parameters` or `rope_theta` and `rope_scaling`.

        Where both are there, `rope_scaling` is in place of all of `rope_parameters`, as in
        transformers: it is what people add to a config to reach long contexts.

        Args:
          theta: what is meant where the config has none.
          interleaved: the family's convention.
          partial: whether the family reads `partial_rotary_factor`; otherwise only 1 is taken.
          types: of what the config may call a type, and what is meant; all of
            `fdq.nn.rotary.ROPE_TYPES` by their names where not given.
        """
        return read_rotary(
            self,
            theta=theta,
            interleaved=interleaved,
            partial=partial,
            types=types,
        )

    def mapping(self, key: str) -> Mapping[str, Any]:
        """As `get`, for an object; an empty one where there is none."""
        found = self.get(key, default={})
        if not isinstance(found, Mapping):
            raise self.wrong((key,), "an object", found)
        return found

    def base(
        self, *, epsilon: float, tie: bool, activation: tuple[str, ...] = _SILU
    ) -> dict[str, Any]:
        """The fields that every family spells alike.

        `epsilon` of the norms and `tie` (tied embeddings) are meant where the config says nothing.
        `activation` is a key and the names that it may have for what the family has.
        """
        self.must_be(*activation)
        heads = self.integer("num_attention_heads", least=1)
        hidden_size = self.integer("hidden_size", least=1)
        layers = self.integer("num_hidden_layers", least=1)
        if layers > MOST_LAYERS:  # before there is a list of them
            raise self.wrong(("num_hidden_layers",), f"at most {MOST_LAYERS}", layers)
        return {
            "model_type": self.family,
            "vocab_size": self.integer("vocab_size", least=1),
            "hidden_size": hidden_size,
            "intermediate_size": self.integer("intermediate_size", least=1),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", default=heads, least=1),
            "head_dim": self.integer("head_dim", default=hidden_size // heads, least=1),
            "rms_norm_epsilon": self.number("rms_norm_eps", default=epsilon),
            "max_position": self.integer("max_position_embeddings", default=131072, least=1),
            "tie_word_embeddings": self.flag("tie_word_embeddings", default=tie),
            "bos_token_id": self.token_id("bos_token_id"),
            "eos_token_ids": self.token_ids("eos_token_id"),
            "pad_token_id": self.token_id("pad_token_id"),
            "dtype": self.dtype(),
        }

    def finish(self) -> None:
        """Refuses keys that nobody read and that are not off: they may change the result."""
        unknown = {
            key: found
            for key, found in self.config.items()
            if key not in self._read and not (found is None or found is False or found in ({}, []))
        }
        if unknown:
            raise ValueError(
                f"{self.family} config has keys that fdq does not know: {_cut(unknown)}. If they "
                "do not change what the model computes, remove them from config.json"
            )


def _cut(found: Any) -> str:
    """As Python writes it, no longer than a line has room for."""
    text = repr(found)
    return text if len(text) <= 300 else f"{text[:300]}…"
