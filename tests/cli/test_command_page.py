"""docs/command.md: each command is run, one after the other, with stand-ins for what it names on the Hub."""

import re
import shlex

from lowrank.cli.main import COMMANDS, main
from lowrank.io.dependencies import ROOT

PAGE = (ROOT / "docs" / "command.md").read_text(encoding="utf8")
LINES = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
TYPED = [shlex.split(line)[1:] for line in LINES if line.startswith("lowrank ") and "--help" not in line]
OWN_TASK = ["my_task", "--include-path", "tasks"]


def test_every_command_of_the_page_runs(hub, here, capsys) -> None:
    stands = {name: [value] for name, value in hub.items()} | {"hellaswag,arc_easy": OWN_TASK}
    for typed in TYPED:
        words = [word for part in typed for word in stands.get(part, [part])]
        few = ["--samples", "8"] if words[0] == "compress" and "--data" in words else []  # the last counts
        status = main([*words, *few])
        said = capsys.readouterr()
        assert status == 0, (typed, said.err)
        assert said.out
    written = {words[words.index("--out") + 1] for words in TYPED if "--out" in words}
    assert all(any((here / name).iterdir()) for name in written)
    assert {words[0] for words in TYPED} == {"compress", "evaluate", "info"} <= COMMANDS.keys()


def test_the_page_shows_the_form_of_chats(here) -> None:
    (shown,) = re.findall(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
    roles = re.findall(r'"role": "(\w+)"', (here / "chats.jsonl").read_text().splitlines()[0])
    assert re.findall(r'"role": "(\w+)"', shown) == roles
