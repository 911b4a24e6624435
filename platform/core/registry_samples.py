"""A new registry's first entries: the adapters that travel with the embedded base."""

import errno
import logging
import shutil
import tempfile
from pathlib import Path

from lorafleet.core.config import home
from lorafleet.core.registry_config import RegistryConfig

logger = logging.getLogger(__name__)


def seed_registry(config: RegistryConfig, samples: Path) -> bool:
    """Copies `samples`, a registry's folder, to where a registry of its own (no `registry.url`) is not there yet.

    Whole or not at all, and never over anything: False if there is a registry, empty or not, or `registry.samples` is
    off. What hinders the copy is logged: a service starts without samples.
    """
    place = home() / "registry"
    if config.url is not None or not config.samples or place.exists():
        return False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".registry-", dir=place.parent) as folder:
            copy = Path(folder) / "registry"
            shutil.copytree(samples, copy, copy_function=shutil.copyfile)  # not the modes: a package may be read-only
            copy.rename(place)  # refused where somebody has pushed meanwhile
    except OSError as error:  # shutil.Error is one too
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            logger.warning("the sample adapters could not be put into %s: %s", place, error)
        return False
    return True
