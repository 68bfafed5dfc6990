"""Floats: every weight decoded, as any program reads them."""

from collections.abc import Sequence

from fdq_checkpoints.export.huggingface import HuggingFaceExporter
from fdq_checkpoints.export.layout import Layer


class Dense(HuggingFaceExporter):
    """Holds every format: values are formed in float32 and rounded to the dtype once."""

    name = "dense"

    def layout(self, layers: Sequence[Layer]) -> None:
        """None: all are decoded."""
        del layers


DENSE = Dense()
