"""Which folders are the suite's: it writes into those that it made, and takes no images from them."""

from pathlib import Path

from diffusion.console import UserError

MARK = ".fewstep"  # a file that every folder of the suite's holds
WORDS = "A command of fewstep made this folder and may replace the files that it wrote here.\n"
# What a folder holds that was made before there were marks: any one of them.
BEFORE_MARKS = ("model.safetensors", "state/state.safetensors", "results.jsonl", "partial.jsonl")


def is_ours(folder: Path) -> bool:
    """Whether a command of the suite made this folder."""
    return (folder / MARK).is_file() or any((folder / name).is_file() for name in BEFORE_MARKS)


def claim(folder: Path) -> None:
    """Make the folder, or take one that is empty or ours, and mark it.

    UserError for a folder that holds files of somebody else's, which a run might replace.
    """
    if folder.is_dir() and not is_ours(folder) and any(folder.iterdir()):
        raise UserError(
            f"{folder} holds files that no command of fewstep made: expected a new or empty folder, "
            "or one of an earlier run; give another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        (folder / MARK).write_text(WORDS)
