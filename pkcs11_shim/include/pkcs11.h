/* PKCS#11 3.2 (OASIS): the types, values and functions that this library needs, by their standard names.
 *
 * Functions stand once, in three lists; prototypes, the function lists and the exports are made from them.
 */
#ifndef HSMVISOR_PKCS11_H
#define HSMVISOR_PKCS11_H

#include <stddef.h>

typedef unsigned char CK_BYTE;
typedef CK_BYTE CK_BBOOL;
typedef CK_BYTE CK_UTF8CHAR;
typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_FLAGS, CK_RV, CK_SLOT_ID, CK_SESSION_HANDLE, CK_OBJECT_HANDLE, CK_USER_TYPE, CK_STATE, CK_NOTIFICATION;
typedef CK_ULONG CK_MECHANISM_TYPE, CK_ATTRIBUTE_TYPE, CK_OBJECT_CLASS;
typedef CK_RV (*CK_NOTIFY)(CK_SESSION_HANDLE, CK_NOTIFICATION, void *);
typedef CK_RV (*CK_CREATEMUTEX)(void **);
typedef CK_RV (*CK_MUTEXCALL)(void *);

#define CK_UNAVAILABLE_INFORMATION ((CK_ULONG)-1)

typedef struct { CK_BYTE major, minor; } CK_VERSION;
typedef struct {
    CK_VERSION cryptokiVersion;
    CK_UTF8CHAR manufacturerID[32];
    CK_FLAGS flags;
    CK_UTF8CHAR libraryDescription[32];
    CK_VERSION libraryVersion;
} CK_INFO;
typedef struct {
    CK_UTF8CHAR slotDescription[64];
    CK_UTF8CHAR manufacturerID[32];
    CK_FLAGS flags;
    CK_VERSION hardwareVersion, firmwareVersion;
} CK_SLOT_INFO;
typedef struct {
    CK_UTF8CHAR label[32], manufacturerID[32], model[16], serialNumber[16];
    CK_FLAGS flags;
    CK_ULONG ulMaxSessionCount, ulSessionCount, ulMaxRwSessionCount, ulRwSessionCount, ulMaxPinLen, ulMinPinLen;
    CK_ULONG ulTotalPublicMemory, ulFreePublicMemory, ulTotalPrivateMemory, ulFreePrivateMemory;
    CK_VERSION hardwareVersion, firmwareVersion;
    CK_UTF8CHAR utcTime[16];
} CK_TOKEN_INFO;
typedef struct { CK_SLOT_ID slotID; CK_STATE state; CK_FLAGS flags; CK_ULONG ulDeviceError; } CK_SESSION_INFO;
typedef struct { CK_ULONG ulMinKeySize, ulMaxKeySize; CK_FLAGS flags; } CK_MECHANISM_INFO;
typedef struct { CK_ATTRIBUTE_TYPE type; void *pValue; CK_ULONG ulValueLen; } CK_ATTRIBUTE;
typedef struct { CK_MECHANISM_TYPE mechanism; void *pParameter; CK_ULONG ulParameterLen; } CK_MECHANISM;
typedef struct {
    CK_CREATEMUTEX CreateMutex;
    CK_MUTEXCALL DestroyMutex, LockMutex, UnlockMutex;
    CK_FLAGS flags;
    void *pReserved;
} CK_C_INITIALIZE_ARGS;
typedef struct { CK_UTF8CHAR *pInterfaceName; void *pFunctionList; CK_FLAGS flags; } CK_INTERFACE;

/* Mechanism parameters that hold pointers or several fields. */
typedef struct { CK_ULONG hashAlg, mgf, sLen; } CK_RSA_PKCS_PSS_PARAMS;
typedef struct { CK_ULONG hashAlg, mgf, source; void *pSourceData; CK_ULONG ulSourceDataLen; } CK_RSA_PKCS_OAEP_PARAMS;
typedef struct {
    CK_ULONG kdf, ulSharedDataLen;
    CK_BYTE *pSharedData;
    CK_ULONG ulPublicDataLen;
    CK_BYTE *pPublicData;
} CK_ECDH1_DERIVE_PARAMS;
typedef struct { CK_BBOOL phFlag; CK_ULONG ulContextDataLen; CK_BYTE *pContextData; } CK_EDDSA_PARAMS;
typedef struct { CK_ULONG hedgeVariant; CK_BYTE *pContext; CK_ULONG ulContextLen; } CK_SIGN_ADDITIONAL_CONTEXT;
typedef struct { CK_ULONG ulAESKeyBits; CK_RSA_PKCS_OAEP_PARAMS *pOAEPParams; } CK_RSA_AES_KEY_WRAP_PARAMS;
typedef struct { CK_ULONG ulCounterBits; CK_BYTE cb[16]; } CK_AES_CTR_PARAMS;
typedef struct {
    CK_BYTE *pIv;
    CK_ULONG ulIvLen, ulIvBits;
    CK_BYTE *pAAD;
    CK_ULONG ulAADLen, ulTagBits;
} CK_GCM_PARAMS;
typedef struct {
    CK_ULONG ulDataLen;
    CK_BYTE *pNonce;
    CK_ULONG ulNonceLen;
    CK_BYTE *pAAD;
    CK_ULONG ulAADLen, ulMACLen;
} CK_CCM_PARAMS;
typedef struct { CK_BYTE *pNonce; CK_ULONG ulNonceLen; CK_BYTE *pAAD; CK_ULONG ulAADLen; } CK_SALSA20_CHACHA20_POLY1305_PARAMS;
typedef struct {
    CK_BBOOL bExtract, bExpand;
    CK_MECHANISM_TYPE prfHashMechanism;
    CK_ULONG ulSaltType;
    CK_BYTE *pSalt;
    CK_ULONG ulSaltLen;
    CK_OBJECT_HANDLE hSaltKey;
    CK_BYTE *pInfo;
    CK_ULONG ulInfoLen;
} CK_HKDF_PARAMS;
typedef struct { CK_BYTE *pData; CK_ULONG ulLen; } CK_KEY_DERIVATION_STRING_DATA;
typedef struct { CK_BYTE iv[16]; CK_BYTE *pData; CK_ULONG length; } CK_AES_CBC_ENCRYPT_DATA_PARAMS;
typedef struct { CK_ULONG type; void *pValue; CK_ULONG ulValueLen; } CK_PRF_DATA_PARAM;
typedef struct { CK_BBOOL bLittleEndian; CK_ULONG ulWidthInBits; } CK_SP800_108_COUNTER_FORMAT;
typedef struct { CK_ULONG dkmLengthMethod; CK_BBOOL bLittleEndian; CK_ULONG ulWidthInBits; } CK_SP800_108_DKM_LENGTH_FORMAT;
typedef struct {
    CK_MECHANISM_TYPE prfType;
    CK_ULONG ulNumberOfDataParams;
    CK_PRF_DATA_PARAM *pDataParams;
    CK_ULONG ulAdditionalDerivedKeys;
    void *pAdditionalDerivedKeys;
} CK_SP800_108_KDF_PARAMS;


/* Parameters of one message: pIv, pNonce and pTag, pMAC are also where the module's answer goes. */
typedef struct { CK_BYTE *pIv; CK_ULONG ulIvLen, ulIvFixedBits, ivGenerator; CK_BYTE *pTag; CK_ULONG ulTagBits; } CK_GCM_MESSAGE_PARAMS;
typedef struct {
    CK_ULONG ulDataLen;
    CK_BYTE *pNonce;
    CK_ULONG ulNonceLen, ulNonceFixedBits, nonceGenerator;
    CK_BYTE *pMAC;
    CK_ULONG ulMACLen;
} CK_CCM_MESSAGE_PARAMS;
typedef struct { CK_BYTE *pNonce; CK_ULONG ulNonceLen; CK_BYTE *pTag; } CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS;

typedef struct {
    CK_ULONG ulVersion;
    CK_BYTE *pValue;
    CK_ULONG ulValue;
    CK_OBJECT_HANDLE hObject, hAdditionalObject;
} CK_ASYNC_DATA;

#define CK_SP800_108_ITERATION_VARIABLE 0x1UL
#define CK_SP800_108_COUNTER 0x2UL
#define CK_SP800_108_DKM_LENGTH 0x3UL
#define CK_SP800_108_BYTE_ARRAY 0x4UL

#define CKM_AES_CTR 0x1086UL
#define CKM_AES_GCM 0x1087UL
#define CKM_AES_CCM 0x1088UL
#define CKM_AES_MAC_GENERAL 0x1084UL
#define CKM_AES_CMAC_GENERAL 0x108BUL
#define CKM_AES_ECB_ENCRYPT_DATA 0x1104UL
#define CKM_AES_CBC_ENCRYPT_DATA 0x1105UL
#define CKM_AES_GMAC 0x108EUL
#define CKM_CHACHA20_POLY1305 0x4021UL
#define CKM_HKDF_DERIVE 0x402AUL
#define CKM_HKDF_DATA 0x402BUL
#define CKM_SP800_108_COUNTER_KDF 0x3ACUL
#define CKM_RSA_AES_KEY_WRAP 0x1054UL
#define CKU_CONTEXT_SPECIFIC 0x2UL

#define CKM_RSA_PKCS_OAEP 0x9UL
#define CKM_RSA_PKCS_PSS 0xDUL
#define CKM_ML_DSA 0x1DUL
#define CKM_EDDSA 0x1057UL
#define CKM_ECDH1_DERIVE 0x1050UL
#define CKM_ECDH1_COFACTOR_DERIVE 0x1051UL

#define CKA_CLASS 0x0UL
#define CKA_LABEL 0x3UL
#define CKA_VALUE 0x11UL
#define CKA_ISSUER 0x81UL
#define CKA_CERTIFICATE_CATEGORY 0x87UL
#define CKA_SUBJECT 0x101UL
#define CKA_WRAP_TEMPLATE 0x40000211UL
#define CKA_UNWRAP_TEMPLATE 0x40000212UL
#define CKA_DERIVE_TEMPLATE 0x40000213UL
#define CKO_CERTIFICATE 0x1UL
#define CK_CERTIFICATE_CATEGORY_AUTHORITY 0x2UL

#define CKF_LIBRARY_CANT_CREATE_OS_THREADS 0x1UL
#define CKF_OS_LOCKING_OK 0x2UL
#define CKF_DONT_BLOCK 0x1UL
#define CKF_RW_SESSION 0x2UL
#define CKF_SERIAL_SESSION 0x4UL
#define CKF_INTERFACE_FORK_SAFE 0x1UL
#define CKF_END_OF_MESSAGE 0x1UL
#define CKF_MESSAGE_ENCRYPT 0x2UL
#define CKF_MESSAGE_DECRYPT 0x4UL
#define CKF_MESSAGE_SIGN 0x8UL
#define CKF_MESSAGE_VERIFY 0x10UL
#define CKF_FIND_OBJECTS 0x40UL
#define CKF_ENCRYPT 0x100UL
#define CKF_DECRYPT 0x200UL
#define CKF_DIGEST 0x400UL
#define CKF_SIGN 0x800UL
#define CKF_SIGN_RECOVER 0x1000UL
#define CKF_VERIFY 0x2000UL
#define CKF_VERIFY_RECOVER 0x4000UL

#define CKR_OK 0x0UL
#define CKR_HOST_MEMORY 0x2UL
#define CKR_SLOT_ID_INVALID 0x3UL
#define CKR_GENERAL_ERROR 0x5UL
#define CKR_FUNCTION_FAILED 0x6UL
#define CKR_ARGUMENTS_BAD 0x7UL
#define CKR_NO_EVENT 0x8UL
#define CKR_NEED_TO_CREATE_THREADS 0x9UL
#define CKR_CANT_LOCK 0xAUL
#define CKR_ATTRIBUTE_SENSITIVE 0x11UL
#define CKR_ATTRIBUTE_TYPE_INVALID 0x12UL
#define CKR_DATA_LEN_RANGE 0x21UL
#define CKR_DEVICE_ERROR 0x30UL
#define CKR_ENCRYPTED_DATA_LEN_RANGE 0x41UL
#define CKR_FUNCTION_CANCELED 0x50UL
#define CKR_FUNCTION_NOT_PARALLEL 0x51UL
#define CKR_FUNCTION_NOT_SUPPORTED 0x54UL
#define CKR_MECHANISM_PARAM_INVALID 0x71UL
#define CKR_OPERATION_ACTIVE 0x90UL
#define CKR_OPERATION_NOT_INITIALIZED 0x91UL
#define CKR_SESSION_CLOSED 0xB0UL
#define CKR_SESSION_HANDLE_INVALID 0xB3UL
#define CKR_SESSION_PARALLEL_NOT_SUPPORTED 0xB4UL
#define CKR_SIGNATURE_LEN_RANGE 0xC1UL
#define CKR_TOKEN_NOT_PRESENT 0xE0UL
#define CKR_BUFFER_TOO_SMALL 0x150UL
#define CKR_SAVED_STATE_INVALID 0x160UL
#define CKR_STATE_UNSAVEABLE 0x180UL
#define CKR_CRYPTOKI_NOT_INITIALIZED 0x190UL
#define CKR_CRYPTOKI_ALREADY_INITIALIZED 0x191UL

#define S_ CK_SESSION_HANDLE session
#define IN_ CK_BYTE *in, CK_ULONG in_len
#define OUT_ CK_BYTE *out, CK_ULONG *out_len
#define TEMPLATE_ CK_ATTRIBUTE *attributes, CK_ULONG count

/* The functions of 2.40 in the order of CK_FUNCTION_LIST. */
#define PKCS11_2_40(F) \
    F(C_Initialize, (void *args)) \
    F(C_Finalize, (void *reserved)) \
    F(C_GetInfo, (CK_INFO *info)) \
    F(C_GetFunctionList, (struct CK_FUNCTION_LIST **list)) \
    F(C_GetSlotList, (CK_BBOOL present, CK_SLOT_ID *slots, CK_ULONG *count)) \
    F(C_GetSlotInfo, (CK_SLOT_ID slot, CK_SLOT_INFO *info)) \
    F(C_GetTokenInfo, (CK_SLOT_ID slot, CK_TOKEN_INFO *info)) \
    F(C_GetMechanismList, (CK_SLOT_ID slot, CK_MECHANISM_TYPE *list, CK_ULONG *count)) \
    F(C_GetMechanismInfo, (CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO *info)) \
    F(C_InitToken, (CK_SLOT_ID slot, CK_UTF8CHAR *pin, CK_ULONG pin_len, CK_UTF8CHAR *label)) \
    F(C_InitPIN, (S_, CK_UTF8CHAR *pin, CK_ULONG pin_len)) \
    F(C_SetPIN, (S_, CK_UTF8CHAR *old_pin, CK_ULONG old_len, CK_UTF8CHAR *new_pin, CK_ULONG new_len)) \
    F(C_OpenSession, (CK_SLOT_ID slot, CK_FLAGS flags, void *application, CK_NOTIFY notify, CK_SESSION_HANDLE *session)) \
    F(C_CloseSession, (S_)) \
    F(C_CloseAllSessions, (CK_SLOT_ID slot)) \
    F(C_GetSessionInfo, (S_, CK_SESSION_INFO *info)) \
    F(C_GetOperationState, (S_, OUT_)) \
    F(C_SetOperationState, (S_, IN_, CK_OBJECT_HANDLE encryption_key, CK_OBJECT_HANDLE authentication_key)) \
    F(C_Login, (S_, CK_USER_TYPE user, CK_UTF8CHAR *pin, CK_ULONG pin_len)) \
    F(C_Logout, (S_)) \
    F(C_CreateObject, (S_, TEMPLATE_, CK_OBJECT_HANDLE *object)) \
    F(C_CopyObject, (S_, CK_OBJECT_HANDLE object, TEMPLATE_, CK_OBJECT_HANDLE *copy)) \
    F(C_DestroyObject, (S_, CK_OBJECT_HANDLE object)) \
    F(C_GetObjectSize, (S_, CK_OBJECT_HANDLE object, CK_ULONG *size)) \
    F(C_GetAttributeValue, (S_, CK_OBJECT_HANDLE object, TEMPLATE_)) \
    F(C_SetAttributeValue, (S_, CK_OBJECT_HANDLE object, TEMPLATE_)) \
    F(C_FindObjectsInit, (S_, TEMPLATE_)) \
    F(C_FindObjects, (S_, CK_OBJECT_HANDLE *objects, CK_ULONG room, CK_ULONG *count)) \
    F(C_FindObjectsFinal, (S_)) \
    F(C_EncryptInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_Encrypt, (S_, IN_, OUT_)) \
    F(C_EncryptUpdate, (S_, IN_, OUT_)) \
    F(C_EncryptFinal, (S_, OUT_)) \
    F(C_DecryptInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_Decrypt, (S_, IN_, OUT_)) \
    F(C_DecryptUpdate, (S_, IN_, OUT_)) \
    F(C_DecryptFinal, (S_, OUT_)) \
    F(C_DigestInit, (S_, CK_MECHANISM *mechanism)) \
    F(C_Digest, (S_, IN_, OUT_)) \
    F(C_DigestUpdate, (S_, IN_)) \
    F(C_DigestKey, (S_, CK_OBJECT_HANDLE key)) \
    F(C_DigestFinal, (S_, OUT_)) \
    F(C_SignInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_Sign, (S_, IN_, OUT_)) \
    F(C_SignUpdate, (S_, IN_)) \
    F(C_SignFinal, (S_, OUT_)) \
    F(C_SignRecoverInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_SignRecover, (S_, IN_, OUT_)) \
    F(C_VerifyInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_Verify, (S_, IN_, CK_BYTE *signature, CK_ULONG signature_len)) \
    F(C_VerifyUpdate, (S_, IN_)) \
    F(C_VerifyFinal, (S_, CK_BYTE *signature, CK_ULONG signature_len)) \
    F(C_VerifyRecoverInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_VerifyRecover, (S_, IN_, OUT_)) \
    F(C_DigestEncryptUpdate, (S_, IN_, OUT_)) \
    F(C_DecryptDigestUpdate, (S_, IN_, OUT_)) \
    F(C_SignEncryptUpdate, (S_, IN_, OUT_)) \
    F(C_DecryptVerifyUpdate, (S_, IN_, OUT_)) \
    F(C_GenerateKey, (S_, CK_MECHANISM *mechanism, TEMPLATE_, CK_OBJECT_HANDLE *key)) \
    F(C_GenerateKeyPair, (S_, CK_MECHANISM *mechanism, CK_ATTRIBUTE *public_attributes, CK_ULONG public_count, \
                          CK_ATTRIBUTE *private_attributes, CK_ULONG private_count, CK_OBJECT_HANDLE *public_key, \
                          CK_OBJECT_HANDLE *private_key)) \
    F(C_WrapKey, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE wrapping_key, CK_OBJECT_HANDLE key, OUT_)) \
    F(C_UnwrapKey, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE unwrapping_key, IN_, TEMPLATE_, CK_OBJECT_HANDLE *key)) \
    F(C_DeriveKey, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE base_key, TEMPLATE_, CK_OBJECT_HANDLE *key)) \
    F(C_SeedRandom, (S_, IN_)) \
    F(C_GenerateRandom, (S_, CK_BYTE *out, CK_ULONG out_len)) \
    F(C_GetFunctionStatus, (S_)) \
    F(C_CancelFunction, (S_)) \
    F(C_WaitForSlotEvent, (CK_FLAGS flags, CK_SLOT_ID *slot, void *reserved))

#define PARAMETER_ void *parameter, CK_ULONG parameter_len

/* What 3.0 adds, in the order of CK_FUNCTION_LIST_3_0. */
#define PKCS11_3_0(F) \
    F(C_GetInterfaceList, (CK_INTERFACE *list, CK_ULONG *count)) \
    F(C_GetInterface, (CK_UTF8CHAR *name, CK_VERSION *version, CK_INTERFACE **interface, CK_FLAGS flags)) \
    F(C_LoginUser, (S_, CK_USER_TYPE user, CK_UTF8CHAR *pin, CK_ULONG pin_len, CK_UTF8CHAR *name, CK_ULONG name_len)) \
    F(C_SessionCancel, (S_, CK_FLAGS flags)) \
    F(C_MessageEncryptInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_EncryptMessage, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len, IN_, OUT_)) \
    F(C_EncryptMessageBegin, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len)) \
    F(C_EncryptMessageNext, (S_, PARAMETER_, IN_, OUT_, CK_FLAGS flags)) \
    F(C_MessageEncryptFinal, (S_)) \
    F(C_MessageDecryptInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_DecryptMessage, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len, IN_, OUT_)) \
    F(C_DecryptMessageBegin, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len)) \
    F(C_DecryptMessageNext, (S_, PARAMETER_, IN_, OUT_, CK_FLAGS flags)) \
    F(C_MessageDecryptFinal, (S_)) \
    F(C_MessageSignInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_SignMessage, (S_, PARAMETER_, IN_, OUT_)) \
    F(C_SignMessageBegin, (S_, PARAMETER_)) \
    F(C_SignMessageNext, (S_, PARAMETER_, IN_, OUT_)) \
    F(C_MessageSignFinal, (S_)) \
    F(C_MessageVerifyInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)) \
    F(C_VerifyMessage, (S_, PARAMETER_, IN_, CK_BYTE *signature, CK_ULONG signature_len)) \
    F(C_VerifyMessageBegin, (S_, PARAMETER_)) \
    F(C_VerifyMessageNext, (S_, PARAMETER_, IN_, CK_BYTE *signature, CK_ULONG signature_len)) \
    F(C_MessageVerifyFinal, (S_))

#define DATA_ CK_BYTE *data, CK_ULONG data_len

/* What 3.2 adds, in the order of CK_FUNCTION_LIST_3_2. */
#define PKCS11_3_2(F) \
    F(C_EncapsulateKey, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE public_key, TEMPLATE_, OUT_, CK_OBJECT_HANDLE *key)) \
    F(C_DecapsulateKey, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE private_key, TEMPLATE_, IN_, CK_OBJECT_HANDLE *key)) \
    F(C_VerifySignatureInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key, CK_BYTE *signature, CK_ULONG signature_len)) \
    F(C_VerifySignature, (S_, IN_)) \
    F(C_VerifySignatureUpdate, (S_, IN_)) \
    F(C_VerifySignatureFinal, (S_)) \
    F(C_GetSessionValidationFlags, (S_, CK_ULONG type, CK_FLAGS *flags)) \
    F(C_AsyncComplete, (S_, CK_UTF8CHAR *function, CK_ASYNC_DATA *result)) \
    F(C_AsyncGetID, (S_, CK_UTF8CHAR *function, CK_ULONG *id)) \
    F(C_AsyncJoin, (S_, CK_UTF8CHAR *function, CK_ULONG id, CK_BYTE *out, CK_ULONG out_len)) \
    F(C_WrapKeyAuthenticated, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE wrapping_key, CK_OBJECT_HANDLE key, DATA_, OUT_)) \
    F(C_UnwrapKeyAuthenticated, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE unwrapping_key, IN_, TEMPLATE_, DATA_, \
                                 CK_OBJECT_HANDLE *key))

struct CK_FUNCTION_LIST;

#define PKCS11_PROTOTYPE_(name, parameters) extern __attribute__((visibility("default"))) CK_RV name parameters;
PKCS11_2_40(PKCS11_PROTOTYPE_)
PKCS11_3_0(PKCS11_PROTOTYPE_)
PKCS11_3_2(PKCS11_PROTOTYPE_)

#define PKCS11_MEMBER_(name, parameters) CK_RV (*name) parameters;
typedef struct CK_FUNCTION_LIST {
    CK_VERSION version;
    PKCS11_2_40(PKCS11_MEMBER_)
} CK_FUNCTION_LIST;
typedef struct {
    CK_VERSION version;
    PKCS11_2_40(PKCS11_MEMBER_)
    PKCS11_3_0(PKCS11_MEMBER_)
} CK_FUNCTION_LIST_3_0;
typedef struct {
    CK_VERSION version;
    PKCS11_2_40(PKCS11_MEMBER_)
    PKCS11_3_0(PKCS11_MEMBER_)
    PKCS11_3_2(PKCS11_MEMBER_)
} CK_FUNCTION_LIST_3_2;

#endif
