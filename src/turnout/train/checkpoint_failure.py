"""What a user reads when a checkpoint could not be written: where, why, what is intact, and the way out."""

import errno
from pathlib import Path

from turnout.errors import CheckpointError
from turnout.train.checkpoint_folder import read_latest

_ADVICE = {
    errno.ENOSPC: "Free disk space, then save again",
    errno.EDQUOT: "Free some of your quota, then save again",
    errno.EFBIG: "Raise the file size limit (ulimit -f), then save again",
    errno.EACCES: "Make the folder writable again",
    errno.EPERM: "Make the folder writable again",
    errno.EROFS: "The file system became read-only: check the disk, then mount it writable",
    errno.ENOTDIR: "A part of this path is a file: give another run folder (--out)",
    errno.EEXIST: "A part of this path is a file: give another run folder (--out)",
}


def failed_save(error: OSError, target: Path, rank: str = "") -> CheckpointError:
    """The error of a save of `target` that the disk of `rank` ("rank 3: ", or nothing) refused."""
    try:
        intact = f"{read_latest(target.parent).name} is untouched and still the latest"
    except CheckpointError:
        intact = "there is no earlier checkpoint"
    advice = _ADVICE.get(error.errno or 0, "Check the disk, then save again")
    return CheckpointError(
        f"{rank}cannot save {target}: {error.strerror or error} (errno {error.errno}, at {error.filename or target}); "
        f"{intact}. {advice}"
    )
