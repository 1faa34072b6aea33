"""Say whether this interpreter can run Manylora: prints its path, or the reason why not and exits 1.

Run by find_python.sh with whatever `python3` is, so its syntax is older than the rest of the project's.
"""

import os
import shutil
import sys
import sysconfig

OLDEST = (3, 10)
NEWEST = (3, 13)
NEWEST_OF_WHEEL = (3, 12)
# The tritonserver of the nvidia-pytriton wheel needs numpy 1.26, which has no build for later versions.


def problem():
    """Return what is wrong with this interpreter, or an empty string."""
    version = sys.version_info[:2]
    name = "Python " + ".".join(str(part) for part in sys.version_info[:3])
    if not OLDEST <= version <= NEWEST:
        return name + ": needs 3.10 to 3.13"
    if shutil.which("tritonserver") or os.path.exists("/opt/tritonserver/bin/tritonserver"):
        return ""
    if version > NEWEST_OF_WHEEL:
        return (
            name
            + ": needs 3.10 to 3.12, or an installed tritonserver (PyPI's has no part for later versions)"
        )
    library = "libpython{}.{}".format(*version)
    folders = [sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib")]
    if not any(os.path.exists(os.path.join(folder, library + ".so.1.0")) for folder in folders):
        return (
            name
            + ": has no "
            + library
            + ".so.1.0, which Triton loads (Debian, Ubuntu: install "
            + library
            + ")"
        )
    try:
        import ensurepip  # noqa: F401  (its absence is Debian's way to say that python3-venv is not installed)
        import venv  # noqa: F401
    except ImportError:
        return name + ": cannot make virtual environments (Debian, Ubuntu: install python3-venv)"
    return ""


reason = problem()
if reason:
    sys.exit(reason + " [" + sys.executable + "]")
print(sys.executable)
