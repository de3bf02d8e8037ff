/* Calls: name here, id on the wire (daemon/hsmvisord/wire/calls.py), name for people. */
#ifndef CALLS_H
#define CALLS_H

#define CALLS(F) \
    F(FINALIZE, 2, "C_Finalize") \
    F(GET_SLOT_LIST, 4, "C_GetSlotList") \
    F(GET_SLOT_INFO, 5, "C_GetSlotInfo") \
    F(GET_TOKEN_INFO, 6, "C_GetTokenInfo") \
    F(GET_MECHANISM_LIST, 7, "C_GetMechanismList") \
    F(GET_MECHANISM_INFO, 8, "C_GetMechanismInfo") \
    F(INIT_TOKEN, 9, "C_InitToken") \
    F(OPEN_SESSION, 10, "C_OpenSession") \
    F(CLOSE_SESSION, 11, "C_CloseSession") \
    F(CLOSE_ALL_SESSIONS, 12, "C_CloseAllSessions") \
    F(GET_SESSION_INFO, 13, "C_GetSessionInfo") \
    F(INIT_PIN, 14, "C_InitPIN") \
    F(SET_PIN, 15, "C_SetPIN") \
    F(GET_OPERATION_STATE, 16, "C_GetOperationState") \
    F(SET_OPERATION_STATE, 17, "C_SetOperationState") \
    F(LOGIN, 18, "C_Login") \
    F(LOGOUT, 19, "C_Logout") \
    F(CREATE_OBJECT, 20, "C_CreateObject") \
    F(COPY_OBJECT, 21, "C_CopyObject") \
    F(DESTROY_OBJECT, 22, "C_DestroyObject") \
    F(GET_OBJECT_SIZE, 23, "C_GetObjectSize") \
    F(GET_ATTRIBUTE_VALUE, 24, "C_GetAttributeValue") \
    F(SET_ATTRIBUTE_VALUE, 25, "C_SetAttributeValue") \
    F(FIND_OBJECTS, 27, "C_FindObjects") \
    F(FIND_OBJECTS_FINAL, 28, "C_FindObjectsFinal") \
    F(ENCRYPT_INIT, 29, "C_EncryptInit") \
    F(ENCRYPT, 30, "C_Encrypt") \
    F(ENCRYPT_UPDATE, 31, "C_EncryptUpdate") \
    F(ENCRYPT_FINAL, 32, "C_EncryptFinal") \
    F(DECRYPT_INIT, 33, "C_DecryptInit") \
    F(DECRYPT, 34, "C_Decrypt") \
    F(DECRYPT_UPDATE, 35, "C_DecryptUpdate") \
    F(DECRYPT_FINAL, 36, "C_DecryptFinal") \
    F(DIGEST_INIT, 37, "C_DigestInit") \
    F(DIGEST, 38, "C_Digest") \
    F(DIGEST_UPDATE, 39, "C_DigestUpdate") \
    F(DIGEST_KEY, 40, "C_DigestKey") \
    F(DIGEST_FINAL, 41, "C_DigestFinal") \
    F(SIGN_INIT, 42, "C_SignInit") \
    F(SIGN, 43, "C_Sign") \
    F(SIGN_UPDATE, 44, "C_SignUpdate") \
    F(SIGN_FINAL, 45, "C_SignFinal") \
    F(SIGN_RECOVER_INIT, 46, "C_SignRecoverInit") \
    F(SIGN_RECOVER, 47, "C_SignRecover") \
    F(VERIFY_INIT, 48, "C_VerifyInit") \
    F(VERIFY, 49, "C_Verify") \
    F(VERIFY_UPDATE, 50, "C_VerifyUpdate") \
    F(VERIFY_FINAL, 51, "C_VerifyFinal") \
    F(VERIFY_RECOVER_INIT, 52, "C_VerifyRecoverInit") \
    F(VERIFY_RECOVER, 53, "C_VerifyRecover") \
    F(DIGEST_ENCRYPT_UPDATE, 54, "C_DigestEncryptUpdate") \
    F(DECRYPT_DIGEST_UPDATE, 55, "C_DecryptDigestUpdate") \
    F(SIGN_ENCRYPT_UPDATE, 56, "C_SignEncryptUpdate") \
    F(DECRYPT_VERIFY_UPDATE, 57, "C_DecryptVerifyUpdate") \
    F(GENERATE_KEY, 58, "C_GenerateKey") \
    F(GENERATE_KEY_PAIR, 59, "C_GenerateKeyPair") \
    F(WRAP_KEY, 60, "C_WrapKey") \
    F(UNWRAP_KEY, 61, "C_UnwrapKey") \
    F(DERIVE_KEY, 62, "C_DeriveKey") \
    F(SEED_RANDOM, 63, "C_SeedRandom") \
    F(GENERATE_RANDOM, 64, "C_GenerateRandom") \
    F(WAIT_FOR_SLOT_EVENT, 65, "C_WaitForSlotEvent") \
    F(LOGIN_USER, 66, "C_LoginUser") \
    F(SESSION_CANCEL, 67, "C_SessionCancel") \
    F(MESSAGE_ENCRYPT_INIT, 68, "C_MessageEncryptInit") \
    F(MESSAGE_ENCRYPT_FINAL, 72, "C_MessageEncryptFinal") \
    F(MESSAGE_DECRYPT_INIT, 73, "C_MessageDecryptInit") \
    F(MESSAGE_DECRYPT_FINAL, 77, "C_MessageDecryptFinal") \
    F(MESSAGE_SIGN_INIT, 78, "C_MessageSignInit") \
    F(SIGN_MESSAGE, 79, "C_SignMessage") \
    F(SIGN_MESSAGE_BEGIN, 80, "C_SignMessageBegin") \
    F(SIGN_MESSAGE_NEXT, 81, "C_SignMessageNext") \
    F(MESSAGE_SIGN_FINAL, 82, "C_MessageSignFinal") \
    F(MESSAGE_VERIFY_INIT, 83, "C_MessageVerifyInit") \
    F(VERIFY_MESSAGE, 84, "C_VerifyMessage") \
    F(VERIFY_MESSAGE_BEGIN, 85, "C_VerifyMessageBegin") \
    F(VERIFY_MESSAGE_NEXT, 86, "C_VerifyMessageNext") \
    F(MESSAGE_VERIFY_FINAL, 87, "C_MessageVerifyFinal") \
    F(HELLO, 256, "Hello") \
    F(RESTORE_SESSIONS, 257, "RestoreSessions") \
    F(SIGN_ONCE, 258, "C_SignInit and C_Sign") \
    F(DECRYPT_ONCE, 259, "C_DecryptInit and C_Decrypt") \
    F(FIND_ONCE, 260, "C_FindObjectsInit") \
    F(VERIFY_ONCE, 261, "C_VerifyInit and C_Verify") \
    F(DIGEST_ONCE, 262, "C_DigestInit and C_Digest") \
    F(ROTATION_WAIT, 263, "C_Rotation_Wait") \
    F(ENCRYPT_MESSAGE, 264, "C_EncryptMessage") \
    F(ENCRYPT_MESSAGE_BEGIN, 265, "C_EncryptMessageBegin") \
    F(ENCRYPT_MESSAGE_NEXT, 266, "C_EncryptMessageNext") \
    F(DECRYPT_MESSAGE, 267, "C_DecryptMessage") \
    F(DECRYPT_MESSAGE_BEGIN, 268, "C_DecryptMessageBegin") \
    F(DECRYPT_MESSAGE_NEXT, 269, "C_DecryptMessageNext") \
    F(VERIFY_SIGNATURE_INIT, 270, "C_VerifySignatureInit") \
    F(VERIFY_SIGNATURE, 271, "C_VerifySignature") \
    F(VERIFY_SIGNATURE_UPDATE, 272, "C_VerifySignatureUpdate") \
    F(VERIFY_SIGNATURE_FINAL, 273, "C_VerifySignatureFinal") \
    F(ENCAPSULATE_KEY, 274, "C_EncapsulateKey") \
    F(DECAPSULATE_KEY, 275, "C_DecapsulateKey") \
    F(WRAP_KEY_AUTHENTICATED, 276, "C_WrapKeyAuthenticated") \
    F(UNWRAP_KEY_AUTHENTICATED, 277, "C_UnwrapKeyAuthenticated") \
    F(GET_SESSION_VALIDATION_FLAGS, 278, "C_GetSessionValidationFlags") \
    F(ENCRYPT_ONCE, 279, "C_EncryptInit and C_Encrypt")

#define CALL_ID_(name, id, text) CALL_##name = id,
enum { CALLS(CALL_ID_) };

#endif
