"""Configurations as FastDeploy publishes them."""

# Its own mixture for ERNIE-4.5-300B-A47B (docs/quantization/wint2.md of the project).
WINT2 = {
    "quantization": "wint2",
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 7,
            "quant_end_layer": 53,
        },
    },
}
