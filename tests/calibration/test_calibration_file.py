"""A calibration survives its file, and a file that is none is refused by name."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from fdq.calibration.calibration_file import HEADER
from fdq.calibration.statistics import Calibration, KeyValueRange


def seen():
    rng = np.random.default_rng(0)

    def positive(*shape):
        return np.abs(rng.standard_normal(shape)).astype(np.float32)

    paths = ("layers.0.mlp.down_proj.kernel", "blocks.up.kernel")
    layer = {name: positive(2, 8) for name in ("k_min", "k_max", "v_min", "v_max")}
    return Calibration(
        absmax={path: positive(3, 16) for path in paths},
        mean_square={path: positive(3, 16) for path in paths},
        cache=tuple(KeyValueRange(**layer) for _ in range(11)),
        tokens=30,
        sample="0123456789abcdef" * 4,
    )


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_what_is_saved_is_loaded(tmp_path):
    calibration, path = seen(), tmp_path / "statistics.npz"
    calibration.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.npz"]
    loaded = Calibration.load(path)
    assert loaded.tokens == 30 and loaded.digest == calibration.digest
    assert loaded.sample == calibration.sample
    for name in ("absmax", "mean_square"):
        found = getattr(loaded, name)
        assert list(found) == list(getattr(calibration, name))
        for key, array in getattr(calibration, name).items():
            np.testing.assert_array_equal(found[key], array)
    np.testing.assert_array_equal(loaded.cache[10].v_max, calibration.cache[10].v_max)
    with np.load(path) as arrays:
        assert "absmax/blocks.up.kernel" in arrays


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


FIRST = "absmax/blocks.up.kernel.npy"


def edited(**changes):
    def edit(content):
        content[HEADER] = json.dumps(json.loads(content[HEADER]) | changes).encode()

    return edit


def replaced(name, data):
    return lambda content: content.__setitem__(name, data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop(FIRST), f"'{FIRST}' is missing"),
        (replaced("absmax/more.npy", npy(np.ones(3))), "'absmax/more.npy' is not listed"),
        (lambda content: content.pop(HEADER), f"no {HEADER}"),
        (replaced(HEADER, b"{"), "not valid JSON"),
        (edited(format="other"), "does not say format"),
        (edited(version=2), "version 2 of the file"),
        (edited(tokens=0), "tokens = 0"),
        (edited(arrays="x"), "no list of strings"),
        (replaced(FIRST, npy(np.ones(3))), "float64"),
        (replaced(FIRST, npy(np.array([{}], object))), "object"),
        (replaced(FIRST, pickle.dumps(1)), "no array in NumPy's format"),
        (replaced(FIRST, npy(np.ones((3, 16), np.float32))[:-4]), "188 bytes, expected 192"),
        (replaced(FIRST, npy(np.full((3, 16), np.nan, np.float32))), "NaN or infinity"),
        (replaced(FIRST, npy(np.full((3, 16), -1, np.float32))), "is no such statistic"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, edit, message):
    path = tmp_path / "statistics.npz"
    seen().save(path)
    content = members(path)
    edit(content)
    rewrite(path, content)
    with pytest.raises(ValueError, match=message) as error:
        Calibration.load(path)
    assert str(path) in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "statistics.npz"
    with pytest.raises(FileNotFoundError):
        Calibration.load(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a calibration, or damaged"):
        Calibration.load(path)
    seen().save(path)
    rewrite(path, members(path), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        Calibration.load(path)
    seen().save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged .*CRC"):
        Calibration.load(path)
