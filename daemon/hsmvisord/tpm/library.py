"""libtpms through cffi (libtpms/tpm_library.h, tpm_tis.h of release 0.9).

The library has one TPM in a process, and no locks: whoever calls sees to it that one call runs at a time, but for CancelCommand.
"""

from __future__ import annotations

from typing import Any

from cffi import FFI

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
""")


class NoLibrary(Exception):
    """The text says what to install."""


def load() -> tuple[Any, Any]:
    """Returns libtpms and the C library.  Raises NoLibrary."""
    try:
        return ffi.dlopen(NAME), ffi.dlopen(None)
    except OSError as error:
        raise NoLibrary(f"{NAME} cannot be loaded ({error}): install it, apt-get install libtpms0") from None
