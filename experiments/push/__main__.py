"""Upload the model of a finished run: `python -m experiments.push runs/my-run repo=NAME/MODEL`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import cli, hints
from experiments.push.card import card
from experiments.report.folder import read_run
from upge.config import Settings, from_tree, key, meanings, parse, split
from upge.errors import ConfigError
from upge.train.files import write_atomically
from upge.train.folder import RunFolder

USAGE = """\
Usage: python -m experiments.push RUN repo=OWNER/NAME [private=false] [--dry-run]

Uploads final/ of a finished run to the Hugging Face hub (or to HF_ENDPOINT), with a model card that is written from the
run: formula, data, settings, accuracy, command, versions. The card is final/README.md. If this file exists, it is kept,
so that you can edit it. --dry-run writes the card, lists what would be uploaded and uploads nothing. Log in with
`hf auth login`, or set HF_TOKEN.
"""
CARD = "README.md"


@dataclass(frozen=True)
class PushConfig(Settings):
    """Where the model goes."""

    repo: str = key("", "repository OWNER/NAME; NAME alone is one of your own")
    private: bool = key(True, "create the repository as a private one; an existing one keeps its visibility")


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload the model; return the exit code."""
    return cli.run_command(_push, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    from experiments.keys import shown

    rows = [cli.help_row(f"{name}={shown(default)}", meaning) for name, default, meaning in meanings(PushConfig)]
    return "\n".join([USAGE, *rows])


def _push(arguments: list[str]) -> int:
    arguments, given = cli.flags(arguments, "--dry-run")
    folders = [one for one in arguments if "=" not in one or Path(one).is_dir()]
    if len(folders) != 1:
        raise ConfigError(f"found {len(folders)} folders; give that of one run, as in upge push runs/my-run repo=NAME")
    config = _settings([one for one in arguments if one not in folders])
    folder = finished(Path(folders[0]).expanduser())
    if not config.repo:
        raise ConfigError("missing; give repo=OWNER/NAME, the repository on the hub", "repo")
    write_card(folder, config.repo.rpartition("/")[2])
    files = sorted(path for path in folder.final.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.relative_to(folder.final)}  {path.stat().st_size / 2**20:.1f} MiB")
    if given["--dry-run"]:
        print(f"nothing was uploaded; the card is {folder.final / CARD}")
    else:
        print(upload(folder, config))
    return cli.DONE


def _settings(arguments: Sequence[str]) -> PushConfig:
    names = [row[0] for row in meanings(PushConfig)]
    tree = {}
    for name, text in map(split, arguments):
        if name not in names:
            raise ConfigError(f"{name}: unknown key; {hints.unknown(name, names)}")
        tree[name] = text if name == "repo" else parse(name, text)
    return from_tree(PushConfig, tree)


def finished(path: Path) -> RunFolder:
    """The folder of a finished run.

    Raises:
        UserError: it is not the folder of a run, or the run has no model yet.
    """
    read_run(path)
    folder = RunFolder(path)
    if not folder.final.is_dir():
        raise ConfigError(f"{path} has no final/: the run has not ended; continue it with output={path}, and push then")
    if not folder.is_finished:
        raise ConfigError(f"{path} is being continued, and final/ is from its earlier end; push it when it has ended")
    return folder


def write_card(folder: RunFolder, name: str) -> None:
    """Write final/README.md from the run, unless there is one."""
    path = folder.final / CARD
    if not path.exists():
        write_atomically(path, card(read_run(folder.path), name))


def upload(folder: RunFolder, config: PushConfig) -> str:
    """Upload final/; return the address of the commit.

    Raises:
        ConfigError: the hub refuses it, or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(library_name="upge")
    try:
        repo = api.create_repo(config.repo, private=config.private, exist_ok=True).repo_id
        message = f"{folder.path.name}, step {folder.metadata['finished_step']}"
        return str(api.upload_folder(repo_id=repo, folder_path=folder.final, commit_message=message).commit_url)
    except LocalTokenNotFoundError as error:
        raise ConfigError("you are not logged in; run `hf auth login`, or set HF_TOKEN", "repo") from error
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        fix = "check the name, your token's right to write there, and the network"
        raise ConfigError(f"{config.repo} was not uploaded: {reason}; {fix}", "repo") from error


if __name__ == "__main__":
    sys.exit(main())
