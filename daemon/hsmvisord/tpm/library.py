"""libtpms through cffi (libtpms/tpm_library.h, tpm_tis.h of release 0.9).

The library has one TPM in a process, and no locks: whoever calls sees to it that one call runs at a time, but for CancelCommand.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, NamedTuple, Protocol

from cffi import FFI

from hsmvisord import native

NAME = "libtpms.so.0"
RETRY, FAIL = 0x800, 9  #: results of a callback: there is no such state; it cannot be kept
TPM_2 = 1
PERMANENT, VOLATILE, SAVED = 1, 2, 4  #: kinds of state

ffi = FFI()
ffi.cdef("""
    typedef uint32_t TPM_RESULT;
    typedef unsigned char TPM_BOOL;
    struct libtpms_callbacks {
        int sizeOfStruct;
        TPM_RESULT (*tpm_nvram_init)(void);
        TPM_RESULT (*tpm_nvram_loaddata)(unsigned char **data, uint32_t *length, uint32_t tpm_number, const char *name);
        TPM_RESULT (*tpm_nvram_storedata)(const unsigned char *data, uint32_t length, uint32_t tpm_number, const char *name);
        TPM_RESULT (*tpm_nvram_deletename)(uint32_t tpm_number, const char *name, TPM_BOOL mustExist);
        TPM_RESULT (*tpm_io_init)(void);
        TPM_RESULT (*tpm_io_getlocality)(uint32_t *locality, uint32_t tpm_number);
        TPM_RESULT (*tpm_io_getphysicalpresence)(TPM_BOOL *present, uint32_t tpm_number);
    };
    TPM_RESULT TPMLIB_ChooseTPMVersion(int version);
    TPM_RESULT TPMLIB_RegisterCallbacks(struct libtpms_callbacks *callbacks);
    TPM_RESULT TPMLIB_MainInit(void);
    void TPMLIB_Terminate(void);
    TPM_RESULT TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *room, unsigned char *command, uint32_t length);
    TPM_RESULT TPMLIB_CancelCommand(void);
    uint32_t TPMLIB_SetBufferSize(uint32_t wanted, uint32_t *least, uint32_t *most);
    TPM_RESULT TPMLIB_SetState(int kind, const unsigned char *data, uint32_t length);
    TPM_RESULT TPMLIB_GetState(int kind, unsigned char **data, uint32_t *length);
    TPM_RESULT TPM_IO_Hash_Start(void);
    TPM_RESULT TPM_IO_Hash_Data(const unsigned char *data, uint32_t length);
    TPM_RESULT TPM_IO_Hash_End(void);
    TPM_RESULT TPM_IO_TpmEstablished_Get(TPM_BOOL *established);
    TPM_RESULT TPM_IO_TpmEstablished_Reset(void);
    void *malloc(size_t size);
    void free(void *data);

    struct plain;
    struct plain *plain_new(void *process, const uint32_t *followed, uint32_t count);
    void plain_free(struct plain *plain);
    bool plain_owes(const uint8_t *page);
    size_t plain_send(int fd, uint8_t *page, const uint8_t *response, size_t size, bool more);
    int plain_serve(struct plain *plain, int fd, uint8_t *page, int64_t look_ns);
    const uint8_t *plain_taken(const struct plain *plain, size_t *length);
    const uint8_t *plain_unsent(const struct plain *plain, size_t *length);
    uint32_t plain_result(const struct plain *plain);
    const uint8_t *plain_answer(struct plain *plain, unsigned char *command, uint32_t length, uint32_t *size);
    void plain_wait(struct plain *plain, int more);
    extern uint32_t plain_locality;
    uint32_t plain_nothing(void);
    uint32_t plain_forget(uint32_t tpm, const char *name, unsigned char must_exist);
    uint32_t plain_tell_locality(uint32_t *locality, uint32_t tpm);
    uint32_t plain_tell_presence(unsigned char *present, uint32_t tpm);
""")


class Owner(Protocol):
    """The TPM of this process, as libtpms calls it."""

    def load(self, data: Any, length: Any, number: int, name: Any) -> int: ...

    def save(self, data: Any, length: int, number: int, name: Any) -> int: ...


class Libraries(NamedTuple):
    tpms: Any  #: libtpms
    c: Any
    plain: Any  #: plain.c


owner: Owner | None = None
_loaded: list[Libraries | str] = []  #: or why not
_made: list[Any] = []  #: the callbacks: libtpms has their addresses, and nothing that keeps them alive


class NoLibrary(Exception):
    """The text says what to install."""


class TpmFault(Exception):
    """What libtpms refused; the text has its result."""


def load() -> Libraries:
    """Returns them as they were found the first time: a confined process opens no file.  Raises NoLibrary."""
    if not _loaded:
        plain = ffi.dlopen(str(native.library(__file__, "_plain")))
        try:
            _loaded.append(Libraries(ffi.dlopen(NAME), ffi.dlopen(None), plain))
        except OSError as error:
            _loaded.append(f"{NAME} cannot be loaded ({error}): install it, apt-get install libtpms0")
    if isinstance(_loaded[0], str):
        raise NoLibrary(_loaded[0])
    return _loaded[0]


def callbacks() -> Any:
    """Returns the struct of callbacks.  Those that call `owner` are made once, in the launcher: a confined process makes no code.
    Raises NoLibrary."""
    if not _made:
        _made.extend(_callbacks())
        for one in _made:
            _protect(int(ffi.cast("uintptr_t", one)))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))  # for good: to free one, its page would be written
    plain = load().plain
    made: Any = ffi.new("struct libtpms_callbacks *")
    made.sizeOfStruct = ffi.sizeof("struct libtpms_callbacks")
    made.tpm_nvram_loaddata, made.tpm_nvram_storedata = _made
    made.tpm_nvram_init = made.tpm_io_init = plain.plain_nothing
    made.tpm_nvram_deletename = plain.plain_forget
    made.tpm_io_getlocality = plain.plain_tell_locality
    made.tpm_io_getphysicalpresence = plain.plain_tell_presence
    return made


def _callbacks() -> list[Any]:
    def load(data: Any, length: Any, number: int, name: Any) -> int:
        return owner.load(data, length, number, name) if owner else FAIL

    def save(data: Any, length: int, number: int, name: Any) -> int:
        return owner.save(data, length, number, name) if owner else FAIL

    return [
        ffi.callback("TPM_RESULT(unsigned char **, uint32_t *, uint32_t, const char *)", load, error=FAIL),
        ffi.callback("TPM_RESULT(const unsigned char *, uint32_t, uint32_t, const char *)", save, error=FAIL),
    ]


def _protect(address: int) -> None:
    """The page of a callback's code is not written any more.  Raises OSError."""
    size = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address // size * size), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
