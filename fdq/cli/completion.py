"""`fdq completion`: a script by which a shell completes commands and options."""

import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fdq.cli import console

NAME = "completion"
EXAMPLE = (
    "Example:  fdq completion bash > ~/.local/share/bash-completion/completions/fdq     |     "
    "fdq completion zsh >> ~/.zshrc     |     "
    "fdq completion fish > ~/.config/fish/completions/fdq.fish"
)
SHELLS = ("bash", "zsh", "fish")


@console.command
def run(
    ctx: typer.Context,
    shell: Annotated[str, typer.Argument(help=f"One of {', '.join(SHELLS)}.")],
    debug: console.Debug = False,
) -> None:
    """Prints the script. It has the names in it: a key press starts no program.

    Make it again after an update of fdq.
    """
    if shell not in SHELLS:
        raise ValueError(f"{shell}: expected one of {', '.join(SHELLS)}.")
    assert ctx.parent is not None
    known = options(ctx.parent.command)
    typer.echo(_fish(known) if shell == "fish" else _bash(known, zsh=shell == "zsh"), nl=False)


def options(app: Any) -> dict[str, dict[str, str]]:
    """By command, its options and what they are for; under `` those of `fdq` itself."""
    commands: Mapping[str, Any] = app.commands
    found = {"": _of(app)}
    return found | {name: _of(command) for name, command in commands.items() if not command.hidden}


def _of(command: Any) -> dict[str, str]:
    names = {"--help": "Show this message and exit."}
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            text = (parameter.help or "").split(". ")[0].rstrip(".")
            names |= {name: text for name in parameter.opts if name.startswith("--")}
    return dict(sorted(names.items()))


def _bash(known: Mapping[str, Mapping[str, str]], *, zsh: bool) -> str:
    commands = " ".join(name for name in known if name)
    cases = "\n".join(
        f"    {name}) words={shlex.quote(' '.join(names))} ;;"
        for name, names in known.items()
        if name
    )
    own = shlex.quote(" ".join(known[""]))
    text = f"""\
_fdq() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" words=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    case "$cur" in
      -*) words={own} ;;
      *) words={shlex.quote(commands)} ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    return
  fi
  case "$cur" in -*) ;; *) return ;; esac
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _fdq fdq
"""
    return f"autoload -U +X compinit bashcompinit\ncompinit\nbashcompinit\n{text}" if zsh else text


def _fish(known: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for name, names in known.items():
        on = f"__fish_seen_subcommand_from {name}" if name else "__fish_use_subcommand"
        if name:
            lines.append(f"complete -c fdq -n __fish_use_subcommand -f -a {name}")
        lines += [
            f"complete -c fdq -n {shlex.quote(on)} -l {option[2:]} -d {shlex.quote(text)}"
            for option, text in names.items()
        ]
    return "\n".join(lines) + "\n"
