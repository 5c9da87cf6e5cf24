"""The examples' short forms: each ends only if it reached what it states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is missing")
pytest.importorskip("sklearn", reason="scikit-learn is missing")
pytest.importorskip("tqdm", reason="tqdm is missing")

from examples import char_gpt, digits_resnet, digits_vit, training, wgan_gp
from examples.dcgan import Discriminator


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """More gain nothing on models of this size, and wait for each other on a busy machine."""
    torch.set_num_threads(1)


def drawn(folder: Path, *names: str) -> None:
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_digits_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits_resnet.main(["--short", "--backend", "cpu", "--out", str(tmp_path)]) >= 0.9
    assert "12 modules replaced, 7 fused" in capsys.readouterr().out
    drawn(tmp_path, "digits_resnet")


def test_digits_vit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits_vit.main(["--short", "--backend", "cpu", "--out", str(tmp_path)]) >= 0.85
    assert "14 modules replaced" in capsys.readouterr().out
    drawn(tmp_path, "digits_vit")


@pytest.mark.parametrize("attention", ["local", "linear"])
def test_char_gpt(attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--short", "--backend", "cpu", "--attention", attention, "--out", str(tmp_path)]
    assert char_gpt.main(options) < 2.9
    assert "Return " in capsys.readouterr().out
    drawn(tmp_path, f"char_gpt_{attention}")


def test_wgan_gp(tmp_path: Path) -> None:
    assert wgan_gp.main(["--short", "--backend", "cpu", "--out", str(tmp_path)]) < 0.6
    drawn(tmp_path, "wgan_gp", "wgan_gp_images")


def test_a_bound_that_is_missed_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Trainer, "step", lambda self, loss: loss.item())
    with pytest.raises(SystemExit, match="is below 90"):
        digits_resnet.main(["--short", "--out", str(tmp_path)])


def test_autocast_and_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are passed on."""
    seen: list[object] = []
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: seen.append(model) or real(model, backend="eager")
    )
    torch._dynamo.reset()
    monkeypatch.setattr(training, "accuracy", lambda *args: 1.0)
    made = training.parser("x", "x")
    args = training.options(made, ["--short", "--amp", "--compile", "--out", str(tmp_path)])
    model = digits_resnet.network(4, 1)
    monkeypatch.setattr(
        training, "digits",
        lambda args: (torch.rand(64, 1, 8, 8), torch.zeros(64).long()) * 2,
    )  # fmt: skip
    dtypes: list[torch.dtype] = []
    model[-1].register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    assert training.train_digits("x", model, args, 1, 1e-3, 0.5) == 1.0
    assert len(seen) == 1 and set(dtypes) == {torch.bfloat16}


def test_the_penalty_differentiates_twice() -> None:
    """By our kernels as by torch's modules."""
    torch.manual_seed(0)
    critic = Discriminator(4, norm=wgan_gp.norm).double()
    real, fake = (torch.randn(3, 1, 16, 16, dtype=torch.double) for _ in range(2))
    found = []
    for backend in ("torch", "cpu"):
        report = training.pydl.replace(critic, backend=backend)
        assert len(report) == 5
        torch.manual_seed(1)
        loss = wgan_gp.penalty(critic, real, fake)
        found.append((loss, torch.autograd.grad(loss, list(critic.parameters())[:3])))
        report.undo()
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_the_schedule_warms_up_and_falls() -> None:
    factor = training.warm_cosine(100, 10)
    assert factor(0) == 0.1 and factor(9) == factor(10) == 1.0
    assert all(factor(i) > factor(i + 1) for i in range(10, 99)) and factor(99) < 1e-3
