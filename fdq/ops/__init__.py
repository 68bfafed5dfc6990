"""What modules call, one directory an op; each op's function is in its `api`."""

from fdq.ops.activation import quantize_activation as quantize_activation
from fdq.ops.attention.xla import attention_reference as attention_reference
from fdq.ops.choice import forced_program as forced_program
from fdq.ops.matmul.dense import transposed_matmul as transposed_matmul
from fdq.ops.matmul.product import parse_activation as parse_activation
from fdq.ops.preparation import prepare as prepare
from fdq.ops.preparation import unprepare as unprepare
