"""``isobit completion``: a script for a shell that completes commands, options and their values."""

import argparse

from isobit.cli import COMMANDS, options_of, values_of

_BASH = """\
_isobit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    local command=${{COMP_WORDS[1]}}
    if [ "$command" = contract ] && [ "$COMP_CWORD" -gt 2 ]; then
        command="contract ${{COMP_WORDS[2]}}"
    fi
    [ "$COMP_CWORD" -eq 1 ] && command=
    case "$command:$before:$word" in
        :*) words="{commands} --help --version" ;;
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _isobit isobit
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


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
    inner = (f"contract {action}" for action in values_of("contract")[""])
    commands = [*COMMANDS, *inner]
    if args.shell == "fish":
        print("\n".join(_fish(commands)))
        return
    cases = "\n".join(line for command in commands for line in _cases(command))
    script = _BASH.format(commands=" ".join(COMMANDS), cases=cases)
    print((_ZSH if args.shell == "zsh" else "") + script, end="")


def _cases(command: str) -> list[str]:
    """What may be written after "command:the word before:"; a file where nothing is said."""
    itself = command.rpartition(" ")[2]
    lines = [
        f'        "{command}:{option or itself}:"*) words="{" ".join(values)}" ;;'
        for option, values in values_of(command).items()
    ]
    options = " ".join(sorted(options_of(command, former=False) or ()))
    return [*lines, f'        "{command}:"*":-"*) words="{options}" ;;']


def _fish(commands: list[str]) -> list[str]:
    lines = [
        f"complete -c isobit -n __fish_use_subcommand -f -a {name} -d '{_quoted(text)}'"
        for name, text in COMMANDS.items()
    ]
    for command in commands:
        condition = " && ".join(f"__fish_seen_subcommand_from {w}" for w in command.split())
        begin = f"complete -c isobit -n '{condition}'"
        values = values_of(command)
        for option in sorted(options_of(command, former=False) or ()):
            kind = "l" if option.startswith("--") else "s"
            words = f" -x -a '{' '.join(values[option])}'" if option in values else ""
            lines.append(f"{begin} -{kind} {option.lstrip('-')}{words}")
        if "" in values:
            lines.append(f"{begin} -f -a '{' '.join(values[''])}'")
    return lines


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
