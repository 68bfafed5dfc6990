import pytest

from pallas_kernels.aot.gpu_targets import ALL, GPUS, SHORT_NAMES, at_least, find, of_device


def test_names_and_architectures():
    assert {name: gpu.arch for name, gpu in GPUS.items()} == {
        "t4": "sm_75",
        "a100": "sm_80",
        "l4": "sm_89",
        "h100": "sm_90a",
        "h200": "sm_90a",
        "b200": "sm_100a",
        "rtx_pro_6000": "sm_120a",
    }
    assert tuple(GPUS) == ALL


# Instructions per 4-bit weight. H200: of its measured bandwidth and clock, scales included.
@pytest.mark.parametrize(
    ("name", "bytes_per_weight", "budget"),
    [("a100", 0.5, 6.3), ("h100", 0.5, 5.0), ("h200", 0.5 + 2 / 128, 3.7), ("l4", 0.5, 25.2)],
)
def test_instruction_budgets(name, bytes_per_weight, budget):
    assert GPUS[name].instruction_budget(bytes_per_weight) == pytest.approx(budget, rel=0.02)


def test_budgets_grow_with_the_bytes():
    gpu = GPUS["t4"]
    assert gpu.instruction_budget(1) == 2 * gpu.instruction_budget(0.5)


def test_names_are_found_in_any_spelling():
    assert find("RTX-Pro 6000") is GPUS["rtx_pro_6000"]
    assert find(" L4 ") is GPUS["l4"]


def test_a_wrong_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"Unknown GPU 'h20': .* t4, a100, .* Did you mean 'h200'"):
        find("h20")


def test_at_least():
    assert at_least(9) == ("h100", "h200", "b200", "rtx_pro_6000")
    assert at_least(7, 5) == ALL


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_devices_are_recognized(kind, name):
    found = of_device(kind)
    assert (found.name if found else None) == name


def test_the_target_config_names_the_gpu():
    text = GPUS["h100"].target_config()
    assert 'name: "NVIDIA H100 80GB HBM3"' in text
    assert "core_count: 132" in text
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "feature_extension: NONE" in GPUS["l4"].target_config()


def test_every_gpu_has_a_name_in_tables():
    assert set(SHORT_NAMES) == set(GPUS)
