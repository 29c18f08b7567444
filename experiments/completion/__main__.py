"""Shell completion: `source <(upge completion bash)`, or the same with zsh."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import cli
from experiments.completion.words import KEYS

USAGE = """\
Usage: upge completion bash|zsh [--update]

Prints a script that completes commands, keys and values of `upge` in this shell. Add to ~/.bashrc or ~/.zshrc:

    source <(upge completion bash)      # in zsh: source <(upge completion zsh)

--update writes the list of keys in experiments/completion/keys.json from the settings classes.
"""
#: bash splits words at = and :, so a completion leaves out everything up to the last of them.
BASH = """\
_upge() {
    local line=${COMP_LINE:0:COMP_POINT} word candidate
    word=${line##*[[:space:]]}
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && candidate=${candidate#"${word%%=*}="}
        COMPREPLY+=("$candidate")
    done < <(upge __complete "$line" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.,] ]]; then
        compopt -o nospace
    fi
}
complete -o default -o nosort -F _upge upge
"""
ZSH = """\
_upge() {
    local -a words_found open done_words
    local word=${words[CURRENT]}
    words_found=(${(f)"$(upge __complete "${LBUFFER}" 2>/dev/null)"})
    open=(${(M)words_found:#*[=.,]})
    done_words=(${words_found:#*[=.,]})
    (( ${#open} )) && compadd -Q -S '' -a open
    (( ${#done_words} )) && compadd -Q -a done_words
    (( ${#open} + ${#done_words} )) || _files
}
(( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
compdef _upge upge
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the script of a shell; return the exit code."""
    return cli.run_command(_completion, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    return USAGE


def _completion(arguments: list[str]) -> int:
    from upge.errors import ConfigError

    if arguments == ["--update"]:
        from experiments.completion.keys import text

        KEYS.write_text(text(), "utf-8")
        return cli.DONE
    scripts = {"bash": BASH, "zsh": ZSH}
    if len(arguments) != 1 or arguments[0] not in scripts:
        raise ConfigError(f"found {' '.join(arguments) or 'no shell'}; give bash or zsh, as in upge completion bash")
    print(scripts[arguments[0]], end="")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
