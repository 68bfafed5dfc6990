"""What modules call: products with quantized weights and attention over a quantized cache."""

from fdq.ops.activation import quantize_activation as quantize_activation
from fdq.ops.attention.arguments import attention_reference as attention_reference
from fdq.ops.choice import forced_formulation as forced_formulation
from fdq.ops.choice import resolve_implementation as resolve_implementation
from fdq.ops.grouped_matmul import grouped_matmul as grouped_matmul
from fdq.ops.layouts import prepare as prepare
from fdq.ops.layouts import unprepare as unprepare
from fdq.ops.matmul import matmul as matmul
from fdq.ops.matmul import parse_activation as parse_activation
from fdq.ops.matmul import transposed_matmul as transposed_matmul
from fdq.ops.token_step import added_up as added_up
from fdq.ops.token_step import expert_products as expert_products
from fdq.ops.token_step import finished as finished
from fdq.ops.token_step import gated as gated
from fdq.ops.token_step import joins_token_step as joins_token_step
from fdq.ops.token_step import normed as normed
from fdq.ops.token_step import partial_product as partial_product
from fdq.ops.token_step import route_token as route_token
