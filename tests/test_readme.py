"""The documentation names only commands, options, variables and files that exist.

Commands are looked at, not run: of blocks of `sh` every line, of blocks of `console` every line after a `$`. That the
demo and its likes do what the pages show is tested where they are.
"""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tracer.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/**/*.md")})
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<info>[^\n`]*)\n(?P<body>.*?)^ *(?P=fence)[ \n]*$", re.M | re.S
)
_PROGRAM = re.compile(r"(^|.*/)vip-tracer")
#: Read by the tests, not by the command.
_OTHER_VARIABLES = {"VIP_TRACER_REQUIRE"}


def commands(text: str) -> list[str]:
    """Every command of the page's blocks, continued lines joined."""
    found = []
    for block in _FENCE.finditer(text):
        kind = block["info"].split()[0] if block["info"].strip() else ""
        if kind not in ("sh", "bash", "shell", "console"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block["body"]).splitlines():
            line = line.strip()
            if kind == "console":
                line = line.removeprefix("$ ") if line.startswith("$ ") else ""
            if line and not line.startswith("#"):
                found.append(line)
    return found


def calls(line: str) -> list[list[str]]:
    """The arguments of each call of vip-tracer in a line, whatever stands before it (sudo, variables, kubectl exec)."""
    words = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    words.whitespace_split = True
    found: list[list[str]] = []
    current: list[str] | None = None
    for word in words:
        if re.fullmatch(r"[();<>|&]+", word):
            current = None
        elif current is not None:
            current.append(word)
        elif _PROGRAM.fullmatch(word):
            current = []
            found.append(current)
    return found


def refusal(arguments: list[str]) -> str:
    """Why the command would refuse these arguments, apart from files that are not there; empty if it would not."""
    name, *rest = arguments or [""]
    if name in ("--help", "-h", "--version"):
        return ""
    command = main.commands.get(name)
    if command is None:
        return f"there is no command {name!r}"
    context = click.Context(command, info_name=name)
    try:
        values, left, _ = command.make_parser(context).parse_args(list(rest))
        for param in command.params:
            given = values.get(param.name)
            if isinstance(param, click.Option) and isinstance(given, str) and not isinstance(param.type, click.Path):
                param.type_cast_value(context, given)
            if isinstance(param, click.Option) and param.required and param.name not in values:
                return f"{param.opts[0]} is missing"
    except click.UsageError as error:
        return error.format_message()
    if left:
        return f"too many arguments: {left}"
    done = CliRunner().invoke(main, [name, *rest, "--help"])
    return "" if done.exit_code == 0 else done.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists(page: Path) -> None:
    lines = commands(page.read_text(encoding="utf-8"))
    refused = {line: why for line in lines for arguments in calls(line) if (why := refusal(arguments))}
    assert refused == {}
    if page.name == "README.md":
        assert any(calls(line) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_variable_of_a_page_is_an_options(page: Path) -> None:
    options = {
        f"VIP_TRACER_{name}_{option.name}".upper().replace("-", "_")
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option)
    } | {"VIP_TRACER_CACHE"}  # of all commands that compile
    named = set(re.findall(r"VIP_TRACER_[A-Z0-9_]*[A-Z0-9]\b(?!\*|_\*)", page.read_text(encoding="utf-8")))
    assert named - options - _OTHER_VARIABLES == set()


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    links = re.findall(r"\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)", text) + re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.M)
    found = []
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            found.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ +(.*)$", _FENCE.sub("", target.read_text(encoding="utf-8")), re.M)
            if anchor not in {slug(heading) for heading in headings}:
                found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


EXAMPLE = """
# A title, with `code`
```sh
make demo   # all of it
sudo vip-tracer agent --output data \\
    --interval 30s &
.venv/bin/vip-tracer observe data -n 5 -o json | jq .
VIP_TRACER_X=1 vip-tracer schema > page.md
```
```console
$ vip-tracer doctor
ok   vip-tracer --nonsense
```
```python
vip-tracer --nonsense
```
[here](#a-title-with-code) [there](page.md) [away](https://example.org/x) [gone](nowhere.md) [no](#nothing)
```
[not a link](nowhere-either.md)
```
"""


def test_this_test_sees_what_it_should(tmp_path: Path) -> None:
    lines = commands(EXAMPLE)
    assert [arguments for line in lines for arguments in calls(line)] == [
        ["agent", "--output", "data", "--interval", "30s"], ["observe", "data", "-n", "5", "-o", "json"], ["schema"],
        ["doctor"],
    ]  # fmt: skip
    assert not [why for line in lines for arguments in calls(line) if (why := refusal(arguments))]
    for wrong in ("", "nonsense", "agent", "agent --output d --nonsense", "agent --output d --interval soon",
                  "observe a b", "observe -o xml", "observe -n 0", "observe -n", "schema --of nothing"):  # fmt: skip
        assert refusal(wrong.split()), wrong
    (tmp_path / "page.md").write_text(EXAMPLE)
    assert broken(tmp_path / "page.md") == ["nowhere.md", "#nothing"]
