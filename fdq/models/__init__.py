"""One config-driven decoder, and a small file per model family."""

from fdq.models import (
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from fdq.models.config import DecoderConfig as DecoderConfig
from fdq.models.decoder import Decoder as Decoder
from fdq.models.decoder import abstract as abstract
from fdq.models.decoder import abstract_layer as abstract_layer
from fdq.models.family import CONFIGS as CONFIGS
from fdq.models.family import FAMILIES as FAMILIES
from fdq.models.family import Family as Family
from fdq.models.family import from_huggingface as from_huggingface
from fdq.models.parts import ATTENTIONS as ATTENTIONS
from fdq.models.parts import BLOCKS as BLOCKS
from fdq.models.parts import MLPS as MLPS
from fdq.models.parts import ROUTERS as ROUTERS
from fdq.models.parts import DecoderLayer as DecoderLayer
from fdq.models.parts import MoEConfig as MoEConfig
from fdq.models.parts import Part as Part

for _family in (
    *(ernie4_5.FAMILY, ernie4_5_moe.FAMILY, gemma2.FAMILY, gemma3.FAMILY, gemma3.MULTIMODAL),
    *(gpt_oss.FAMILY, granite.FAMILY, seed_oss.FAMILY, smollm3.FAMILY, mistral.MULTIMODAL),
    *(glm4.GLM, glm4.GLM4),
    *(llama.FAMILY, mistral.FAMILY, phi3.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY),
    *(deepseek_v2.FAMILY, deepseek_v3.FAMILY, glm4_moe.FAMILY, glm4_moe_lite.FAMILY),
):
    FAMILIES.register(_family)
