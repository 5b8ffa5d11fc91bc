"""What `vitds run` has to know of the command that it runs: its hostfile, how it reaches hosts, its output directory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where `deepspeed` looks if it is given none."""
_RUNNER = re.compile(r"(.*/)?(deepspeed|ds|deepspeed[./]launcher[./]runner(\.py)?)")
_FLAGS = {
    "--module", "--no_python", "--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid",
    "--bind_cores_to_rank", "--quiet", "-q",
}  # fmt: skip
"""Options of the `deepspeed` launcher (0.19) that take no value; all others take one."""
_SHORT = {"-H": "--hostfile", "-i": "--include", "-e": "--exclude", "-q": "--quiet"}


class Launcher:
    """The words of a command, and the options of the `deepspeed` among them, if there is one."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.options: dict[str, str] = {}
        """Of the launcher itself, not of the script; the last of each counts."""
        self._runner = next((i for i, word in enumerate(self.words) if _RUNNER.fullmatch(word)), None)
        self._hostfile_words: list[int] = []
        at = len(self.words) if self._runner is None else self._runner + 1
        while at < len(self.words) and self.words[at].startswith("-"):
            word = self.words[at]
            short, attached = _SHORT.get(word[:2]), word[2:]
            if short and attached and not word.startswith("--"):
                name, value, length = short, attached, 1  # -Hhosts
            elif "=" in word:
                name, _, value = word.partition("=")
                length = 1
            else:
                name, length = _SHORT.get(word, word), 1 if word in _FLAGS else 2
                value = self.words[at + 1] if length == 2 and at + 1 < len(self.words) else ""
            self.options[name] = value
            if name == "--hostfile":
                self._hostfile_words += range(at, min(at + length, len(self.words)))
            at += length

    @property
    def hostfile(self) -> Path | None:
        """The hostfile from which this command starts processes on other hosts; None where it does not, or not by ssh."""
        own = "--no_ssh" in self.options or self.options.get("--launcher", "").lower() == "slurm"
        if self._runner is None or own:
            return None
        if "--hostfile" in self.options:
            return Path(self.options["--hostfile"])
        return DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None

    def with_hostfile(self, path: Path, *more: str) -> list[str]:
        """The words of the same command with another hostfile, and more options of `deepspeed`."""
        assert self._runner is not None
        kept = [(i, word) for i, word in enumerate(self.words) if i not in self._hostfile_words]
        before = [word for i, word in kept if i <= self._runner]
        return [*before, "--hostfile", str(path), *more, *(word for i, word in kept if i > self._runner)]

    @property
    def ssh_port(self) -> str | None:
        """Where sshd of the other hosts listens, if the command says so."""
        return self.options.get("--ssh_port")

    @property
    def output_dir(self) -> Path | None:
        """The last --output-dir among the words of the command."""
        found = self.script_option("--output-dir")
        return Path(found[-1]) if found else None

    def script_option(self, name: str) -> list[str]:
        """The values of an option of the script, `--name value` or `--name=value`, in order."""
        found = []
        for word, following in zip(self.words, [*self.words[1:], None], strict=True):
            if word == name and following is not None:
                found.append(following)
            elif word.startswith(f"{name}="):
                found.append(word.partition("=")[2])
        return [value for value in found if value]
