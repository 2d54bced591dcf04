import os
import re
import subprocess
import sys
import zipfile

import pytest

from megatron_anyexperts import cli
from megatron_anyexperts.training.help import OFTEN_USED, OUR_GROUPS
from tests.end_to_end.launch import ROOT

TRAINING = ("pretrain", "tune", "pictures", "upcycle")


def test_the_overview_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name}  +\w", text, re.M) for name in cli.VERBS)
    assert cli.main([]) == 2


def test_the_version_names_what_it_stands_on(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"megatron-anyexperts \S+, megatron-core 0\.19\.\S+, torch \S+\n", capsys.readouterr().out)


@pytest.mark.parametrize(("words", "near"), [(["pretrian"], "pretrain"), (["corpus", "verfy"], "corpus verify")])
def test_an_unknown_verb_is_refused_with_the_nearest(words, near, capsys):
    assert cli.main(words) == 2
    assert near in capsys.readouterr().err


def help_of(*words: str) -> str:
    # In a process of its own: a training command changes streams and signals of its process.
    command = [sys.executable, "-m", "megatron_anyexperts", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself(name):
    text = help_of(*name.split(), "--help")
    assert text.startswith(f"usage: anyexperts {name}")
    if name in TRAINING:
        assert all(f"\n{title}:\n" in text for title in OUR_GROUPS)
        assert all(f"--{flag}" in text for flag in OFTEN_USED)
        assert len(text.splitlines()) < 400


def test_all_flags_are_shown_on_request():
    # The one whose help dies of a per cent sign in Megatron 0.19.
    assert "--moe-paged-stash-buffer-size-factor-cuda" in help_of("pretrain", "--help-all")


def test_a_shell_completes_verbs_and_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    cli.main(["completion", "bash"])
    script = tmp_path / "anyexperts"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        line = f'source {script}; COMP_WORDS=(anyexperts {" ".join(words)}); COMP_CWORD={len(words)}; '
        call = ["bash", "-c", line + '_shtab_anyexperts; printf "%s\\n" "${COMPREPLY[@]}"']
        return set(subprocess.run(call, capture_output=True, text=True, check=True).stdout.split())

    assert completed("gen") == {"generate"}
    assert completed("corpus", "b") == {"build"}
    assert completed("pretrain", "--anyexperts-k-") == {"--anyexperts-k-min", "--anyexperts-k-max"}
    assert completed("generate", "--temp") == {"--temperature"}


def test_a_wheel_brings_command_and_configurations(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, tmp_path, ROOT], check=True, env=environment, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    shipped = {path.name for path in (ROOT / "pretrain/configs").glob("*.yaml")}
    assert {f"megatron_anyexperts/configs/{name}" for name in shipped} <= set(names)
    assert {"megatron_anyexperts/py.typed", "megatron_anyexperts/analysis/report.html"} <= set(names)
    code = "from megatron_anyexperts.training.config_files import read_config as r; print(r('demo')['hidden-size'])"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(answer.stdout) > 0
