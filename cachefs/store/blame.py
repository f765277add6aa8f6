"""What an error of a file system is evidence of: the medium, or nothing but this process and its machine."""

from __future__ import annotations

import errno

_OF_THE_PROCESS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
_OF_THE_MEDIUM = frozenset(
    (
        errno.EIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENODATA,
        errno.EBADMSG,
        errno.EUCLEAN,
        errno.EREMOTEIO,
        errno.ETIMEDOUT,
        errno.ESHUTDOWN,
    )
)


def is_of_the_medium(error: BaseException | None) -> bool:
    """Whether a read failed because of what is below the file system."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MEDIUM


def is_of_the_process(error: BaseException | None) -> bool:
    """Whether something failed for want of descriptors or memory: that says nothing about the disk or what it holds."""
    return isinstance(error, OSError) and error.errno in _OF_THE_PROCESS
