"""What the README names is there, and its example runs."""

from __future__ import annotations

import re

import pytest
import torch


@pytest.fixture(scope="module")
def readme(repo):
    return (repo / "README.md").read_text(encoding="utf-8")


def test_paths_exist(repo, readme):
    folders = "scripts|sdpo|tests|assets|eval|prompts|docs"
    named = set(re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*\w)", readme))
    for module in re.findall(r"python -m (sdpo[\w.]+)", readme):
        path = module.replace(".", "/")
        named.add(f"{path}/__main__.py" if (repo / path).is_dir() else f"{path}.py")
    assert len(named) > 10
    # A recipe's script is named by its file alone in the table of recipes.
    named |= {f"scripts/train/{name}" for name in re.findall(r"`((?:sd15|sdxl)_\w+\.sh)`", readme)}
    missing = [name for name in named if not (repo / name).exists()]
    assert not missing


def test_flags_exist(readme):
    from sdpo.args import build_parser
    from sdpo.evaluation.compare.config import build_parser as build_comparison_parser
    from sdpo.evaluation.evaluate import build_parser as build_evaluation_parser
    from sdpo.lab.audit.run import build_parser as build_audit_parser
    from sdpo.lab.plot import build_parser as build_plot_parser
    from sdpo.lab.sweep.run import build_parser as build_sweep_parser

    parsers = [build_parser(), build_evaluation_parser(), build_comparison_parser(None)]
    parsers += [build_sweep_parser(), build_plot_parser(), build_audit_parser()]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    launcher = {"--num_machines", "--num_processes", "--machine_rank", "--main_process_ip"}
    launcher |= {"--main_process_port", "--config"}
    # Of other programs.
    other = {"--method", "--steps", "--out", "--repeats", "--no-NAME", "--source"}
    named = set(re.findall(r"--[a-zA-Z][\w-]*", readme))
    assert len(named) > 30
    assert named <= known | launcher | other


def test_example_sweep_is_one(repo, readme, pairs_dir, tmp_path, monkeypatch):
    from sdpo.lab.sweep.file import read_sweep

    monkeypatch.chdir(repo)
    (text,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert "output/quickstart/pairs" in text
    path = tmp_path / "scales.yaml"
    path.write_text(text.replace("output/quickstart/pairs", str(pairs_dir)))
    sweep = read_sweep(path)
    assert len(sweep.runs) == 3 * 2 * 3
    assert sweep.heldout and sweep.images


def test_no_placeholder_is_left(readme):
    assert not re.search(r"^[A-Z_]{6,}$|\bTODO\b|\bTBD\b", readme, re.MULTILINE)


def test_example_runs(readme):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "preference_loss" in code
    assert "loser_scale" in code
    torch.manual_seed(0)
    ref_pred, noise = torch.randn(2, 4, 4, 8, 8)
    # Far from the reference the sigmoid is flat, and the gradient may be 0.
    model_pred = (ref_pred + 1e-3 * torch.randn(4, 4, 8, 8)).requires_grad_()
    logged = []
    names = {"model_pred": model_pred, "ref_pred": ref_pred, "noise": noise, "log": logged.append}
    names |= {"pred_w": model_pred[:2], "pred_l": model_pred[2:]}
    names |= {"noise_w": noise[:2], "noise_l": noise[2:]}
    exec(code, names)
    assert model_pred.grad.abs().sum() > 0
    assert names["scale"].shape == (2,)
    assert not names["scale"].requires_grad
    (metrics,) = logged
    for name in re.findall(r"# (winner_drift.*), \.\.\.", code)[0].split(", "):
        assert name in metrics
