"""The launcher of TPMs where libtpms is not installed: its name is one that there is not."""

from __future__ import annotations

from hsmvisord.tpm import launcher, library

if __name__ == "__main__":
    library.NAME = "libtpms-that-there-is-not.so.0"
    launcher.main()
