import hypothesis
import hypothesis.strategies as st
import pytest

from fdq.formats import FORMATS
from fdq.schemes import grammar
from fdq.schemes.kinds import CACHE_FORMATS
from fdq.schemes.scheme import ActivationSpec, CacheSpec, Scheme, WeightSpec


@st.composite
def weight_specs(draw):
    format = draw(st.sampled_from(list(FORMATS.values())))
    if format.fixed:
        return WeightSpec.default(format.name)
    granularity = draw(st.sampled_from(format.granularities))
    size = st.integers(1, 4096)
    fields = {"granularity": granularity}
    if granularity == "group":
        fields["group_size"] = draw(size)
    if granularity == "block":
        fields["block_size"] = (draw(size), draw(size))
    fields["zero_point"] = draw(st.sampled_from(format.zero_points))
    if draw(st.booleans()):
        fields["scale_dtype"] = draw(st.sampled_from(format.scale_dtypes))
    if format.double_quantization:
        fields["double_quantization"] = draw(st.booleans())
    return WeightSpec.default(format.name, **fields)


@st.composite
def activation_specs(draw):
    format = draw(st.sampled_from(grammar.ACTIVATION_FORMATS))
    granularity = draw(st.sampled_from(["token", "token_group", "tensor"]))
    group = draw(st.integers(1, 4096)) if granularity == "token_group" else None
    dynamic = granularity != "tensor"
    return ActivationSpec(format=format, granularity=granularity, group_size=group, dynamic=dynamic)


@st.composite
def cache_specs(draw):
    format = draw(st.sampled_from(list(CACHE_FORMATS)))
    granularity = draw(st.sampled_from(["token_head", "channel", "head", "block"]))
    dynamic, transform = granularity in ("token_head", "block"), "none"
    if granularity == "token_head":
        transform = draw(st.sampled_from(["none", "rotated", "centered"]))
    return CacheSpec(
        format=format,
        granularity=granularity,
        dynamic=dynamic,
        zero_point=CACHE_FORMATS[format].has_zero,
        transform=transform,
    )


@st.composite
def schemes(draw):
    weight = draw(st.none() | weight_specs())
    activation = draw(st.none() | activation_specs()) if weight else None
    return Scheme(weight=weight, activation=activation, cache=draw(st.none() | cache_specs()))


@hypothesis.given(schemes())
@hypothesis.settings(max_examples=500, deadline=None)
def test_every_scheme_has_a_name_that_parses_back(scheme):
    name = str(scheme)
    assert Scheme.parse(name) == scheme
    assert Scheme.parse(name.upper()) == Scheme.parse(name.lower()) == scheme
    for part in (scheme.weight, scheme.activation, scheme.cache):
        assert part is None or type(part).parse(str(part)) == part


def weight(format, **fields):
    return WeightSpec(format=format, **fields)


GROUPS_OF_128 = {"granularity": "group", "group_size": 128, "scale_dtype": "bfloat16"}
BLOCKS = {"granularity": "block", "block_size": (128, 128)}
INT8, FP8 = ActivationSpec(format="int8"), ActivationSpec(format="float8_e4m3")
C8 = CacheSpec(format="int8")
MISSION = {
    "W8A8C8": (weight("int8"), INT8, C8),
    "W8A8C16": (weight("int8"), INT8, None),
    "W4A16C16": (weight("int4", **GROUPS_OF_128), None, None),
    "W4A16C8": (weight("int4", **GROUPS_OF_128), None, C8),
    "WNF4A8C8": (
        weight("nf4", granularity="group", group_size=64, scale_dtype="bfloat16"),
        INT8,
        C8,
    ),
    "Wfp8Afp8": (weight("float8_e4m3"), FP8, None),
    "W4Afp8": (weight("int4", **GROUPS_OF_128), FP8, None),
    "W4A8C8": (weight("int4", **GROUPS_OF_128), INT8, C8),
    "W2": (weight("int2", zero_point="half", **GROUPS_OF_128), None, None),
    "W4-affine": (weight("int4", zero_point="offset", **GROUPS_OF_128), None, None),
    "WINT8": (weight("int8"), None, None),
    "WInt4": (weight("int4", **GROUPS_OF_128), None, None),
    "wint3": (weight("int3", **GROUPS_OF_128), None, None),
    "wint2": (
        weight("cc2", granularity="group", group_size=64, scale_dtype="uint4"),
        None,
        None,
    ),
    "block_wise_fp8": (
        weight("float8_e4m3", **BLOCKS),
        ActivationSpec(format="float8_e4m3", granularity="token_group", group_size=128),
        None,
    ),
    "tensor_wise_fp8": (
        weight("float8_e4m3", granularity="tensor"),
        ActivationSpec(format="float8_e4m3", granularity="tensor", dynamic=False),
        None,
    ),
    "mxfp4": (
        weight("mxfp4", granularity="group", group_size=32, scale_dtype="float8_e8m0fnu"),
        None,
        None,
    ),
    "nvfp4": (
        weight("nvfp4", granularity="group", group_size=16, scale_dtype="float8_e4m3fn"),
        None,
        None,
    ),
    "C8": (None, None, C8),
    "W4A16C4-kvhead": (
        weight("int4", **GROUPS_OF_128),
        None,
        CacheSpec(format="int4", granularity="head", dynamic=False, zero_point=True),
    ),
}


@pytest.mark.parametrize("name", MISSION)
def test_names_mean_what_the_documentation_says(name):
    parts = dict(zip(("weight", "activation", "cache"), MISSION[name], strict=True))
    assert Scheme.parse(name) == Scheme(**parts)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("w8a8", "W8A8C16"),
        ("wfp8afp8", "Wfp8Afp8C16"),
        ("w4afp8", "W4Afp8C16"),
        ("w4a8", "W4A8C16"),
        ("weight_only_int8", "wint8"),
        ("weight_only_int4", "WInt4"),
        ("mix_quant", "W4A8C8"),
        ("WInt2", "WCC2A16C16"),
        ("WInt2A16C16", "W2A16C16"),
        ("bf16", "W16A16C16"),
        ("W4-g128", "W4A16C16"),
        ("Wfp8e4m3", "Wfp8"),
        ("wint4-channel", "W4A16C16-channel"),
        ("block_wise_fp8-ue8m0", "Wfp8Afp8C16-b128-ue8m0"),
        ("block_wise_fp8-b64", "Wfp8Afp8C16-b64"),
        ("Wfp8Afp8-b128-x128", "block_wise_fp8"),
    ],
)
def test_aliases(name, same):
    assert Scheme.parse(name) == Scheme.parse(same)


def test_canonical_names_leave_defaults_out():
    assert str(Scheme.parse("w4-g128-sym-bf16")) == "W4A16C16"
    assert str(Scheme.parse("W4A8C8-asym-g32-static-kvchannel-f32")) == (
        "W4A8C8-g32-asym-f32-static-kvchannel"
    )
    assert str(Scheme.parse("block_wise_fp8")) == "Wfp8Afp8C16-b128"
    assert str(Scheme.parse("Wfp8Afp8-b128-token")) == "Wfp8Afp8C16-b128-token"


@pytest.mark.parametrize(
    ("name", "channel"),
    [("wint8", True), ("wint4", True), ("w4a8", True), ("w4afp8", False), ("wint4-g64", False)],
)
def test_fastdeploy_scales_are_per_channel(name, channel):
    spec = Scheme.parse(name, compat="fastdeploy").weight
    assert (spec.granularity == "channel") == channel
    with pytest.raises(ValueError, match="use None or one of fastdeploy"):
        Scheme.parse(name, compat="vllm")


@pytest.mark.parametrize(
    ("name", "unread", "nearest"),
    [
        ("W4A16C8g128", "'g128'", "W4A16C8-g128"),
        ("W5A16", "'W5'", "W4A16C16"),
        ("W6", "'W6'", "W8A16C16"),
        ("W4A4C5", "'A4'", "W4A8C4"),
        ("W16A8", "16-bit weights", "W8A8C16"),
        ("Wint5-g64", "'Wint5'", "W4A16C16-g64"),
        ("W 4", "'w 4'", "W4A16C16"),
        ("fp8", "'fp8'", "Wfp8A16C16"),
        ("A16W4", "'w4'", "W4A16C16"),
        ("W4_A16_C8", "'_a16_c8'", "W4A16C8"),
        ("w4a16-gruop64", "'-gruop64'", "W4A16C16-g64"),
        ("W4A16-g0", "'-g0'", "W4A16C16"),
        ("block_wise_f8", "'block_wise_f8'", "block_wise_fp8"),
        ("mixquant", "'mixquant'", "mix_quant"),
        ("int4", "'int4'", "wint4"),
        ("INT8", "'int8'", "wint8"),
        ("int5", "'int5'", "W4A16C16"),
        ("A8", "16-bit weights", "W8A8C16"),
        ("W4A16-g64-channel", "'-g64' and '-channel' both decide what shares a scale", "W4A16C16"),
        ("W4-static", "'-static' is about activations", "W4A16C16"),
        ("WNF4-channel", "takes group", "WNF4A16C16"),
        ("WMXFP4-g64", "groups of 32", "WMXFP4A16C16"),
        ("W8-ue8m0", "float8_e8m0fnu", "W8A16C16"),
        ("W4-dq", "nf4 only", "W4A16C16"),
    ],
)
def test_wrong_names_point_at_the_part_and_suggest(name, unread, nearest):
    with pytest.raises(ValueError) as error:
        Scheme.parse(name)
    message = str(error.value)
    assert message.startswith(f"Unknown quantization scheme {name!r}. Did you mean {nearest!r}?")
    assert unread in message
    Scheme.parse(nearest)


def test_an_empty_name_has_no_nearest():
    with pytest.raises(ValueError, match="The name is empty. Names look like"):
        Scheme.parse(" ")


@hypothesis.given(st.text(max_size=20))
@hypothesis.settings(deadline=None)
def test_any_text_parses_or_raises_value_error(text):
    try:
        Scheme.parse(text)
    except ValueError as error:
        assert repr(text) in str(error)


def test_not_a_name():
    with pytest.raises(TypeError, match="got int"):
        Scheme.parse(4)
    assert Scheme.parse(Scheme()) == Scheme() == Scheme.parse("W16A16C16")


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (WeightSpec, {"format": "int5"}, "unknown format; use one of int8"),
        (WeightSpec, {"format": "int4", "granularity": "group"}, "group_size goes with"),
        (WeightSpec, {"format": "int4", "group_size": 64}, "group_size goes with"),
        (WeightSpec, {"format": "float8_e4m3", "granularity": "block"}, "block_size goes with"),
        (
            WeightSpec,
            {"format": "int4", "granularity": "block", "block_size": (1, 1)},
            "this format",
        ),
        (WeightSpec, {"format": "float8_e4m3", "zero_point": "half"}, "only integer formats"),
        (WeightSpec, {"format": "int4", "granularity": "group", "group_size": -1}, "not positive"),
        (
            WeightSpec,
            {"format": "int4", "granularity": "group", "group_size": "64"},
            "group_size='64'.*not positive",
        ),
        (WeightSpec, {"format": "int4", "scale_dtype": float}, "takes 'float32', 'bfloat16'"),
        (ActivationSpec, {"format": "int4"}, "unknown format"),
        (ActivationSpec, {"format": "int8", "granularity": "tensor"}, "static"),
        (ActivationSpec, {"format": "int8", "granularity": "token_group"}, "group_size goes with"),
        (CacheSpec, {"format": "nf4"}, "unknown format"),
        (CacheSpec, {"format": "int8", "granularity": "channel"}, "dynamic=False"),
        (CacheSpec, {"format": "int4"}, "int4 needs zero_point=True"),
        (Scheme, {"activation": INT8}, "16-bit weights"),
    ],
)
def test_contradictory_specs_cannot_be_made(spec, fields, message):
    with pytest.raises(ValueError, match=message):
        spec(**fields)


def test_parts_parse_alone():
    assert CacheSpec.parse("C8") == CacheSpec.parse("int8") == C8
    assert CacheSpec.parse("fp8-kvhead").granularity == "head"
    assert CacheSpec.parse("C16") is ActivationSpec.parse("bf16") is None
    assert ActivationSpec.parse("fp8-x128").group_size == 128
    assert WeightSpec.parse("cc2") == WeightSpec.parse("WCC2") == Scheme.parse("wint2").weight
    assert WeightSpec.parse("int4-g32").group_size == 32
    with pytest.raises(ValueError, match="Could not read 'C5'"):
        CacheSpec.parse("C5")
