"""Where a scorer's weights come from: the hub, or the place that `--weights` names.

Files are checked against their sha256 where it is known: written down here, or, for large files of
the hub, in the name under which its client keeps them.
"""

from __future__ import annotations

import hashlib
import logging
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sdpo.common.errors import UserError, first_line
from sdpo.common.files import file_sha256, hub_sha256
from sdpo.common.hub import look_for_hub
from sdpo.models.loading import check_finite, from_pretrained, load_tensors
from sdpo.models.locations import HUB_ID

log = logging.getLogger(__name__)

# Of which files `from_pretrained` reads the first that are there, beside JSON and text.
MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_SMALL_FILES = ("*.json", "*.txt")


@dataclass(frozen=True)
class Part:
    """Names one thing that a scorer loads.

    `hub` is a repository id; with `file` the part is that one file of it, else the repository as a
    whole (what `from_pretrained` takes), one of whose `files` must be there. `url` is where a file
    that is not on the hub can be had. A part that lies `beside` another is looked for there where a
    user has given only that other.
    """

    hub: str | None = None
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    beside: str | None = None
    files: tuple[str, ...] = MODEL_FILES

    @property
    def source(self) -> str:
        """Where it is had by default, in words."""
        if self.hub:
            return f"{self.hub}/{self.file}" if self.file else self.hub
        return self.url or "--weights"


@dataclass(frozen=True)
class Weights:
    """Finds and loads the parts of one scorer.

    Attributes:
        scorer: its name.
        parts: part name to where the part is had by default.
        overrides: part name to a local path (or hub id) to take instead.
        cache_dir: where downloads are kept.
    """

    scorer: str
    parts: dict[str, Part]
    overrides: dict[str, str] = field(default_factory=dict)
    cache_dir: str | None = None

    def flag(self, part: str = "model") -> str:
        """Spell what a user writes to replace a part, without the path."""
        return f"--weights {self.scorer}{'' if part == 'model' else '.' + part}"

    def source(self, part: str = "model") -> str:
        """Name the directory or hub id that `from_pretrained` takes for a part.

        Raises:
            UserError: the override looks like a path and is not there.
        """
        given = self.overrides.get(part)
        if given is None:
            return self.parts[part].source
        if not Path(given).exists() and not HUB_ID.fullmatch(given):
            raise UserError(f"{self.flag(part)}: there is no file or directory {given}")
        return given

    def file(self, part: str = "model") -> Path:
        """Find a part's file on this machine, downloaded where need be, and verify it.

        An override may be the file or a directory that holds it under its own name.

        Raises:
            UserError: not to be had, or of another sha256.
        """
        wanted, given = self.parts[part], self.overrides.get(part)
        name = wanted.file or Path(wanted.url or "").name
        if given is not None:
            path = Path(given) / name if Path(given).is_dir() else Path(given)
            if not path.is_file():
                raise UserError(f"{self.flag(part)}: there is no file {path}")
            if wanted.sha256 and file_sha256(path) != wanted.sha256:
                log.warning("%s: %s is not the published file", self.flag(part), path)
            return path
        if wanted.beside in self.overrides:
            path = self.file(wanted.beside).with_name(name)
            if not path.is_file():
                raise UserError(
                    f"{self.flag(wanted.beside)}: there is no {name} in {path.parent}; download it "
                    f"from {wanted.hub} too, or give {self.flag(part)}=PATH"
                )
            return path
        try:
            path = self._download(wanted, name)
        # Hub, URL and file errors come in many classes; all mean that the file is not there.
        except Exception as error:
            raise UserError(
                f"{self.scorer}: cannot get {name} from {wanted.hub or wanted.url} "
                f"({first_line(error)}); download it elsewhere, put it on this machine and give "
                f"{self.flag(part)}=PATH"
            ) from error
        known = wanted.sha256 or hub_sha256(path)
        if known and file_sha256(path) != known:
            raise UserError(
                f"{self.scorer}: {path} is damaged (its sha256 is not {known}); delete it to "
                f"download it again, or give {self.flag(part)}=PATH"
            )
        return path

    def pretrained(self, cls: Any, part: str) -> Any:
        """Call `cls.from_pretrained` on a part that is a repository or directory.

        Raises:
            UserError: nothing of the kind there, no network and no cache, or weights are missing.
        """
        source, advice = self.source(part), self._advice(part)
        return from_pretrained(cls, self.scorer, source, advice, cache_dir=self.cache_dir)

    def fetch(self, part: str) -> None:
        """Bring what is loaded of a part to this machine, without loading it.

        Raises:
            UserError: it is not to be had.
        """
        wanted = self.parts[part]
        if wanted.file:
            self.file(part)
            return
        source, why = self.source(part), f"it has no {' or '.join(wanted.files)}"
        try:
            for name in wanted.files:
                if any(self._folder(source, name).glob(name)):
                    return
        # Hub and network errors come in many classes; all mean that the files are not there.
        except Exception as error:
            why = first_line(error)
        raise UserError(f"{self.scorer}: cannot get {source} ({why}); {self._advice(part)}")

    def _folder(self, source: str, name: str) -> Path:
        """Give a directory, or that of a repository on the hub with what is so named in it."""
        if Path(source).exists():
            return Path(source)
        from huggingface_hub import snapshot_download

        look_for_hub()
        wanted = [*_SMALL_FILES, name]
        return Path(snapshot_download(source, allow_patterns=wanted, cache_dir=self.cache_dir))

    def _advice(self, part: str) -> str:
        return (
            "where the hub cannot be reached, put the files of "
            f"{self.parts[part].source} into a directory and give {self.flag(part)}=DIR"
        )

    def _download(self, wanted: Part, name: str) -> Path:
        if wanted.hub:
            from huggingface_hub import hf_hub_download

            look_for_hub()
            return Path(hf_hub_download(wanted.hub, name, cache_dir=self.cache_dir))
        from torch.hub import download_url_to_file, get_dir

        path = Path(self.cache_dir or get_dir()) / "scorers" / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written to a temporary file and moved when whole.
            download_url_to_file(wanted.source, str(path), hash_prefix=wanted.sha256)
        return path

    def identity(self) -> dict[str, Any]:
        """Tell these weights from others without reading them: by their sources, and local files by
        size and time of change."""
        return {part: _identity(self._place(part)) for part in sorted(self.parts)}

    def _place(self, part: str) -> str:
        beside = self.parts[part].beside
        if part not in self.overrides and beside in self.overrides:
            return str(self.file(part))
        return self.source(part)


def _identity(source: str) -> list[Any]:
    path = Path(source)
    if not path.exists():
        return [source]
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return [str(path.resolve()), hashlib.sha256(repr(stats).encode()).hexdigest()]


def read_tensors(path: Path, flag: str) -> Any:
    """Read what a file of weights holds, to the CPU, without running pickled code.

    Raises:
        UserError: missing, truncated, or not a file of tensors; names `flag`.
    """
    try:
        return load_tensors(path)
    # Truncated zips, pickles with code and foreign files each raise something else.
    except Exception as error:
        raise UserError(f"{flag}: cannot read weights from {path}: {first_line(error)}") from None


def load_exactly(module: nn.Module, state: Any, where: str) -> None:
    """Load a state dict of which every name and every shape fits. The module may be on meta: it
    takes over the tensors themselves.

    Raises:
        UserError: saying one thing that does not, or that is not finite; begins with `where`.
    """
    try:
        module.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = str(error).strip().splitlines()
        # One line can name a thousand weights.
        reason = textwrap.shorten(detail[1 if len(detail) > 1 else 0], 200, placeholder=" ...")
        raise UserError(f"{where} does not fit: {reason}") from None
    check_finite(module, where)
