"""The backups of a store: every manifest, and every byte that one of them names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from logstore.errors import LogstoreError
from logstore.ops.backup.manifest import Manifest, missing_objects, read_manifest
from logstore.ops.backup.pool import FolderTarget, OtherBytesError, verified
from logstore.ops.progress import Progress
from logstore.ops.verify.report import Finding, found
from logstore.storage.files import Disk


class BackupsCheck(NamedTuple):
    """What was found of all backups in a folder.

    Attributes:
        files: Objects and manifests read.
        bytes: Of the objects.
        findings: What is wrong.
        damaged: Objects with other bytes than they were written with.
    """

    files: int
    bytes: int
    findings: list[Finding]
    damaged: list[Path]


def check_backups(folder: Path, disk: Disk, *, quick: bool, progress: Progress) -> BackupsCheck:
    """Check all backups in a folder; an object that many of them share is read once."""
    target = FolderTarget(folder, disk)
    findings: list[Finding] = []
    manifests: dict[str, Manifest] = {}
    with target.reading():
        for key in target.manifests():
            try:
                manifests[key] = read_manifest(target, key)
            except FileNotFoundError:
                continue
            except (LogstoreError, OSError) as error:
                findings.append(found("backup", folder / key, str(error)))
        if quick:
            for key, manifest in manifests.items():
                findings += [found("backup", folder / key, problem) for problem in missing_objects(target, manifest)]
            return BackupsCheck(len(manifests), 0, findings, [])
        return _read_objects(target, manifests, findings, progress)


def _read_objects(
    target: FolderTarget, manifests: dict[str, Manifest], findings: list[Finding], progress: Progress
) -> BackupsCheck:
    sizes = {file.sha256: (file.key, file.bytes) for manifest in manifests.values() for file in manifest.files}
    total, done = sum(size for _, size in sizes.values()), 0
    bad: dict[str, str] = {}
    damaged: list[Path] = []
    for digest, (key, size) in sizes.items():
        path = target.folder / key
        try:
            for _ in verified(target.read(key), digest, str(path)):
                pass
        except FileNotFoundError:
            bad[digest] = "is missing"
        except OtherBytesError:
            bad[digest] = "has other bytes than it was written with"
            damaged.append(path)
        except OSError as error:
            bad[digest] = f"cannot be read: {error}"
        done += size
        progress("verifying backups", done, total)
    for digest, problem in bad.items():
        key = sizes[digest][0]
        users = [
            f"{file.path} in {name}" for name, each in manifests.items() for file in each.files if file.sha256 == digest
        ]
        findings.append(found("backup", target.folder / key, f"the object {problem}; it is {', '.join(users[:5])}"))
    return BackupsCheck(len(manifests) + len(sizes), done, findings, damaged)
