/* What the library knows of its sessions: enough to save round trips, and to restore them after a lost connection. */
#ifndef SESSION_H
#define SESSION_H

#include "pkcs11.h"

#include <stdbool.h>
#include <stdint.h>

enum operation { OPERATION_FIND, OPERATION_SIGN, OPERATION_VERIFY, OPERATION_DECRYPT, OPERATION_DIGEST, OPERATION_ENCRYPT, OPERATIONS };

#define MAX_PROVEN_MECHANISM 128u /* bytes of an encoded mechanism that is remembered */

/* An Init that was not sent: it has succeeded before with the same words, so the operation's own call carries it. */
struct deferred {
    bool pending;
    CK_OBJECT_HANDLE key;
    uint32_t length;
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
    CK_ULONG output_size; /* of the signature, 0 = not known yet */
};

struct session {
    CK_SESSION_HANDLE handle;
    CK_SLOT_ID slot;
    CK_FLAGS flags;
    bool open;
    unsigned active; /* bit (1 << operation): the module has it open */
    unsigned lost;   /* bit: a lost connection ended it */
    struct deferred deferred[OPERATIONS];
    CK_OBJECT_HANDLE *found; /* handles of an open search that were fetched already */
    CK_ULONG found_count, found_next;
    bool found_more; /* the module holds the rest */
    struct session *next;
};

/* NULL when there is no such session.  A session's memory stays valid for ever: two threads that misuse one harm no memory. */
struct session *session_find(CK_SESSION_HANDLE handle);
struct session *session_add(CK_SESSION_HANDLE handle, CK_SLOT_ID slot, CK_FLAGS flags);
void session_remove(struct session *session);
void sessions_clear(CK_SLOT_ID slot, bool all);

/* For a new application on the module: the sessions that are to be restored, and what was lost with the old one. */
struct session *sessions_first(void);
struct session *sessions_next(struct session *session);
void session_interrupted(struct session *session);

void sessions_lock(void);
void sessions_unlock(void);
void sessions_child(void); /* in a forked child: fresh locks, no sessions */

/* Whether an Init with this encoded mechanism and key has succeeded; `output_size` is what the operation gave then. */
bool proof_find(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length, CK_ULONG *output_size);
void proof_add(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length, CK_ULONG output_size);
void proofs_clear(void);

#endif
