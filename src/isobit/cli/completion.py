"""``isobit completion``: a script for a shell that completes commands and options."""

import argparse

from isobit.cli import COMMANDS, options_of

_BASH = """\
_isobit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    elif [ "$command" = contract ] && [ "$COMP_CWORD" -eq 2 ]; then
        words="{actions}"
    elif [ "${{word#-}}" != "$word" ]; then
        [ "$command" = contract ] && command="contract ${{COMP_WORDS[2]}}"
        case "$command" in
{cases}
        esac
    fi
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _isobit isobit
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
_ACTIONS = ("schema", "validate", "lint", "check", "status", "amend")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Print a script that completes commands, options and files. For bash, put "
        "'eval \"$(isobit completion bash)\"' in ~/.bashrc; for zsh likewise in ~/.zshrc; for "
        "fish, write it to ~/.config/fish/completions/isobit.fish."
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    commands = (*COMMANDS, *(f"contract {action}" for action in _ACTIONS))
    known = {name: frozenset(options_of(name) or ()) for name in commands}
    if args.shell == "fish":
        print("\n".join(_fish(known)))
        return
    cases = "\n".join(
        f'        "{name}") words="{" ".join(sorted(options))}" ;;'
        for name, options in known.items()
    )
    script = _BASH.format(commands=" ".join(COMMANDS), actions=" ".join(_ACTIONS), cases=cases)
    print((_ZSH if args.shell == "zsh" else "") + script, end="")


def _fish(known: dict[str, frozenset[str]]) -> list[str]:
    lines = [
        f"complete -c isobit -n __fish_use_subcommand -f -a {name} -d '{_quoted(text)}'"
        for name, text in COMMANDS.items()
    ]
    seen = "__fish_seen_subcommand_from"
    lines.append(f"complete -c isobit -n '{seen} contract' -f -a '{' '.join(_ACTIONS)}'")
    for name, options in known.items():
        condition = " && ".join(f"{seen} {word}" for word in name.split())
        for option in sorted(options):
            kind = "l" if option.startswith("--") else "s"
            lines.append(f"complete -c isobit -n '{condition}' -{kind} {option.lstrip('-')}")
    return lines


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
